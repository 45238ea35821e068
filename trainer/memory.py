"""Bytes of a run by kind, per process: known before it starts.

P parameters over N processes, in float32 at every precision (bf16 and fp16 are autocast), with d averages of the
weights; what ZeRO divides is in Rajbhandari et al. 2020 (ZeRO), section 5. What DeepSpeed 0.19 keeps beside that:

           stage 0       stage 1              stage 2           stage 3
weights    4 P           4 P                  4 P               4 P/N, and what is gathered (_weights)
gradients  4 P           4 P, or 4 P/N (*)    4 P/N, twice (**) 4 P/N
masters    the weights   4 P/N                4 P/N             4 P/N
moments    8 P           8 P/N                8 P/N             8 P/N
averages   4 d P/N       4 d P/N              4 d P/N           4 d P/N
buckets    none          4 B, twice if reduction overlaps       8 B

(*) 4 P/N where each backward pass is a step and gradients are reduced while it goes on. (**) once where each backward
pass is a step. Where gradients are divided, the largest parameter's is there as a whole for a while. B is
`engine.bucket_elements`, at most P. When the step itself begins, activations and buckets are gone and the gradients are
copied into one flat tensor. Partitions are padded by a few elements, which are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from trainer.activations import activations
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ModelConfig
from trainer.config.run import RunConfig
from trainer.deepspeed_settings import Settings, deepspeed_settings
from trainer.engine import split_batch
from trainer.models import build_model

FLOAT = 4  # bytes
_PERSISTENT = 100_000  # elements: DeepSpeed's own default


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: on its device, and at the end in its host's memory."""

    weights: float
    gradients: float
    masters: float  # the weights that the optimizer updates, where they are a copy
    moments: float
    averages: float
    buckets: float  # gradients under way between processes
    activations: float  # the most of a forward and backward pass
    flat_gradients: float  # a copy that lives during the step, when activations and buckets do not
    host: float  # what is offloaded, and the snapshot of a checkpoint being written

    @property
    def state(self) -> float:
        """What is there all the time, gradients included."""
        return self.weights + self.gradients + self.masters + self.moments + self.averages

    @property
    def total(self) -> float:
        """The most on the device at once; gradients are taken as all there while activations are."""
        return self.state + max(self.activations + self.buckets, self.flat_gradients)


def memory_of(
    config: RunConfig, num_processes: int, *, micro_batch: int | None = None, device: str = "cuda"
) -> Memory:  # fmt: skip
    """What each of `num_processes` processes needs; `micro_batch` replaces the config's.

    Activations are traced as they are on a GPU; a CPU's kernels need about as much. Raises ConfigError for a batch
    that cannot be divided so, and for contradictions in `engine.deepspeed`.
    """
    engine, train = config.engine, config.train
    micro, accumulation = split_batch(with_micro_batch(config, micro_batch or train.micro_batch), num_processes)
    sizes = _parameters(config.model, config.diffusion)
    params = sum(sizes)
    settings = deepspeed_settings(
        config, torch.device(device), micro_batch=micro, accumulation=accumulation, num_params=params
    )
    zero = settings["zero_optimization"]
    stage, offloaded = engine.zero_stage, engine.offload_optimizer
    accumulates, overlaps = accumulation > 1, bool(zero.get("overlap_comm"))
    whole, part = FLOAT * params, FLOAT * params / num_processes

    moments = 2 * (whole if stage == 0 else part)
    masters = part if stage else 0.0
    averages = len(train.averages) * part
    if stage == 0 or (stage == 1 and (accumulates or not overlaps)):
        gradients = float(whole)
    else:
        kept = 0 if offloaded else 2 if stage == 2 and accumulates else 1
        gradients = kept * part + FLOAT * max(sizes)
    bucket = FLOAT * min(int(zero.get("reduce_bucket_size", 0)), params)
    snapshot = part * (1 + 2 + len(train.averages))
    host = snapshot
    if offloaded:
        host += masters + moments + averages + 2 * part  # gradients, and a buffer on the way there or back
        masters = moments = averages = 0.0
    return Memory(
        weights=_weights(config, num_processes, zero), gradients=gradients, masters=masters, moments=moments,
        averages=averages, buckets=bucket * {0: 0, 1: 1 + overlaps, 2: 1 + overlaps, 3: 2}[stage],
        activations=activations_of(config, micro), flat_gradients=0.0 if offloaded else whole if stage == 0 else part,
        host=host,
    )  # fmt: skip


def share_of_batch(config: RunConfig, num_processes: int) -> int:
    """Images of a step that one process computes. Raises ConfigError where the batch cannot be divided so."""
    micro, accumulation = split_batch(with_micro_batch(config, None), num_processes)
    return micro * accumulation


def with_micro_batch(config: RunConfig, micro_batch: int | None) -> RunConfig:
    """The same run in forward passes of so many images; None: of its whole share."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def activations_of(config: RunConfig, batch: int) -> float:
    """Bytes of a forward and backward pass of `batch` images."""
    half, checkpointing = config.engine.precision != "fp32", config.engine.activation_checkpointing
    return activations(config.model, config.diffusion, half=half, checkpointing=checkpointing).peak(batch)


def divisors(share: int) -> list[int]:
    """The micro-batches that a share of the batch can be divided into, largest first."""
    return [n for n in range(share, 0, -1) if share % n == 0]


def largest_that_fits(config: RunConfig, num_processes: int, limit: float, *, device: str = "cuda") -> int | None:
    """The largest micro-batch whose memory stays within `limit` bytes a device; None where not one image does."""
    share = share_of_batch(config, num_processes)
    return next(
        (n for n in divisors(share) if memory_of(config, num_processes, micro_batch=n, device=device).total <= limit),
        None,
    )


def remedies(config: RunConfig, num_processes: int) -> str:
    """What could still be changed where not one image fits."""
    engine = config.engine
    ways = {
        "engine.activation_checkpointing=true": not engine.activation_checkpointing,
        "engine.precision=bf16": engine.precision == "fp32",
        "engine.zero_stage=3": engine.zero_stage < 3 and num_processes > 1,
        "engine.offload_optimizer=true (ZeRO 1 to 3)": not engine.offload_optimizer,
        "more processes, each with its own device": engine.zero_stage > 0,
        "a smaller network": True,
    }
    return "try " + ", ".join(way for way, is_open in ways.items() if is_open)


def _weights(config: RunConfig, num_processes: int, zero: Settings) -> float:
    """The weights on the device: under ZeRO-3 this process's part, and what is gathered from the others at a time."""
    params = _parameters(config.model, config.diffusion)
    whole = FLOAT * sum(params)
    if config.engine.zero_stage < 3 or num_processes == 1:
        return whole
    persistent: int = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    # Parameters that come again within the reuse distance stay. The first one of a forward pass comes again after all
    # others did twice.
    kept: float = zero["stage3_max_reuse_distance"] / 2 + zero["stage3_prefetch_bucket_size"]
    always = sum(n for n in params if n < persistent)
    gathered = min(sum(params), always + kept + max(params))
    return whole / num_processes + FLOAT * gathered


@lru_cache(maxsize=64)
def _parameters(model: ModelConfig, diffusion: DiffusionConfig) -> tuple[int, ...]:
    """The elements of each parameter."""
    with torch.device("meta"):
        return tuple(p.numel() for p in build_model(model, diffusion).parameters())
