"""What the processes of a run send to each other in a step, and the time that it takes: a model to plan with.

Ring collectives: to reduce-scatter or all-gather n bytes among N processes, each sends and receives (N - 1)/N n, in
N - 1 rounds. Gradients and weights are float32 at every precision. The model is calibrated and held against a measured
job by `python -m benchmarks.train_step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BYTES = 4  # of a float32
BACKWARD_SHARE = 2 / 3  # of a step's computing: what the reduction of gradients can hide behind


@dataclass(frozen=True)
class Link:
    """What connects a process with the next one in the ring; the slowest such link of a job counts."""

    bandwidth: float  # bytes/s in one direction
    latency: float  # seconds a round of a collective operation


@dataclass(frozen=True)
class Traffic:
    """What one process sends in a step."""

    reduced: float  # bytes of gradients
    gathered: float  # bytes of weights
    messages: int  # collective operations

    @property
    def bytes(self) -> float:
        return self.reduced + self.gathered


def traffic(
    *, num_params: int, num_processes: int, zero_stage: int, accumulation: int = 1, bucket_elements: int = 50_000_000
) -> Traffic:
    """Bytes that one process sends in a step.

    ZeRO 0 reduces the gradients once a step, by reduce-scatter and all-gather; 1 reduce-scatters them once a step and
    all-gathers the updated weights; 2 reduce-scatters after every micro-batch; 3 gathers the weights forward and
    backward, too.
    """
    share = (num_processes - 1) / num_processes * num_params * BYTES
    buckets = math.ceil(num_params / bucket_elements)
    if num_processes == 1:
        return Traffic(0.0, 0.0, 0)
    if zero_stage <= 1:
        return Traffic(share, share, 2 * buckets)
    if zero_stage == 2:
        return Traffic(accumulation * share, share, (accumulation + 1) * buckets)
    return Traffic(accumulation * share, 2 * accumulation * share, 3 * accumulation * buckets)


def step_seconds(
    compute_seconds: float, sent: Traffic, link: Link, *, num_processes: int, overlap: bool = False
) -> float:
    """A step's time from that of its computing alone; `overlap`: gradients are reduced during the backward pass."""
    latency = sent.messages * (num_processes - 1) * link.latency
    reducing = sent.reduced / link.bandwidth
    if overlap:
        reducing = max(0.0, reducing - BACKWARD_SHARE * compute_seconds)
    return compute_seconds + reducing + sent.gathered / link.bandwidth + latency
