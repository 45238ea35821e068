"""What the processes of a run send to each other in a step, and the time that it takes: a model to plan with.

    python -m trainer.communication --config CONFIG --processes 8,64,512 --bandwidth 40e9 --latency 1e-5

Ring collectives: to reduce-scatter or all-gather n bytes among N processes, each sends and receives (N - 1)/N n, in
N - 1 rounds. Gradients and weights are float32 at every precision. The model is calibrated and held against a measured
job by `python -m benchmarks.train_step`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError, run_cli
from trainer.config.run import load_config
from trainer.engine import split_batch
from trainer.models import count

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


def main() -> int:
    parser = argparse.ArgumentParser(description="Predicted time of a step on many processes, each with its own share.")
    parser.add_argument("--config", required=True, type=Path, help="a run's YAML file")
    parser.add_argument("--processes", default="1,8,64,512", help="numbers of processes")
    parser.add_argument("--bandwidth", type=float, default=40e9, help="bytes/s of the slowest link, in one direction")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds a round of a collective operation")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a device")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of it that computing alone reaches")
    parser.add_argument("--no-overlap", action="store_true", help="gradients are not reduced during the backward pass")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces the file's value")
    a = parser.parse_args()
    numbers = [int(n) if n.strip().isdecimal() else 0 for n in a.processes.split(",")]
    if min(numbers) < 1:
        raise UserError(f"--processes={a.processes}: give numbers above 0, such as 8,64,512.")
    for option, value in {"--bandwidth": a.bandwidth, "--peak": a.peak}.items():
        if not 0 < value < math.inf:
            raise UserError(f"{option}={value:g} must be more than 0.")
    if not 0 <= a.latency < math.inf:
        raise UserError(f"--latency={a.latency:g} must be 0 or more.")
    if not 0 < a.mfu <= 1:
        raise UserError(f"--mfu={a.mfu:g} must be a share from 0 to 1, such as 0.3.")
    config = load_config(a.config, a.overrides)
    cost, link = count(config.model, config.diffusion), Link(a.bandwidth, a.latency)
    print(f"{config.name}: {cost.num_params:,} parameters, {a.bandwidth / 1e9:g} GB/s, {a.latency * 1e6:g} us a round")
    print("processes  images each  compute s  step s  efficiency     img/s  MB sent")
    for n in numbers:
        micro, accumulation = split_batch(config, n)
        share = micro * accumulation
        compute = share * cost.train_flops / (a.peak * a.mfu)
        sent = traffic(
            num_params=cost.num_params, num_processes=n, zero_stage=config.engine.zero_stage,
            accumulation=accumulation, bucket_elements=config.engine.bucket_elements,
        )  # fmt: skip
        step = step_seconds(compute, sent, link, num_processes=n, overlap=not a.no_overlap)
        print(
            f"{n:9d}  {share:11d}  {compute:9.4f}  {step:6.4f}  {compute / step:10.1%}  {n * share / step:8.0f}"
            f"  {sent.bytes / 1e6:7.0f}"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
