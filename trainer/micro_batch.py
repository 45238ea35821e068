"""`--auto-micro-batch`: the largest micro-batch that fits into the memory at hand.

On a GPU the estimate only says where to begin: then the network really runs forward and backward, and what it took is
measured. On the CPU the estimate decides.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from data_pipeline.errors import AgreedError
from trainer.activations import drop_gradients
from trainer.checkpoint import list_checkpoints
from trainer.config.run import RunConfig
from trainer.engine import DTYPES
from trainer.memory import Memory, divisors, memory_of, remedies, share_of_batch, with_micro_batch
from trainer.models import build_model, random_inputs
from trainer.processes import Processes
from trainer.run_folder import RunFolder

USABLE = 0.92  # of a device's memory: the rest is for kernels' workspaces and what the allocator cannot join


@dataclass(frozen=True)
class Room:
    """Bytes of a device, and how many of them a process may use."""

    usable: float
    total: float


def with_fitting_micro_batch(config: RunConfig, processes: Processes) -> RunConfig:
    """The config with the micro-batch of the run's last checkpoint, or else with the largest that fits.

    What is free differs from start to start; another micro-batch would be another layout, and a run that goes on is to
    go on bit for bit.
    """
    before = processes.from_main(lambda: _micro_batch_before(config, processes))
    if before is not None:
        if processes.is_main:
            print(f"micro-batch {before}, as before", flush=True)
        return with_micro_batch(config, before)
    checkpoint_activations = config.engine.activation_checkpointing
    return with_largest_micro_batch(
        config, processes,
        lambda: build_model(config.model, config.diffusion, checkpoint_activations=checkpoint_activations),
    )  # fmt: skip


def _micro_batch_before(config: RunConfig, processes: Processes) -> int | None:
    """That of the newest checkpoint, if as many processes of the same kind wrote it."""
    for path in list_checkpoints(RunFolder(config.run.folder).checkpoints):
        try:
            layout = json.loads((path / "state.json").read_text())["layout"]
        except (OSError, ValueError, KeyError):
            continue  # damaged, as the resume will say
        same = (layout["num_processes"], layout["device"]) == (processes.world_size, processes.device.type)
        return int(layout["micro_batch"]) if same else None
    return None


def with_largest_micro_batch(config: RunConfig, processes: Processes, build: Callable[[], nn.Module]) -> RunConfig:
    """The config with `train.micro_batch` set to the largest that fits on every process; the main one says which.

    `build` makes the network. Nothing of this stays: no memory, and the random generators are as before. Raises
    UserError, on all processes alike, where not one image fits.
    """
    share = share_of_batch(config, processes.world_size)
    room = _room(processes.device)
    with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
        measure = _measure_on_gpu(config, processes, build) if processes.device.type == "cuda" else None
        mine = search(config, processes.world_size, room.usable, measure, device=processes.device.type)
    del measure
    _free(processes.device)
    found = processes.gather_objects(mine)
    smallest = min((f for f in found if f is not None), key=lambda f: f[0], default=None)
    if smallest is None or None in found:
        need = memory_of(config, processes.world_size, micro_batch=1, device=processes.device.type).total
        raise AgreedError(
            f"not one image fits: it needs {need / 1e9:.2f} GB on each device, and {room.usable / 1e9:.2f} of "
            f"{room.total / 1e9:.1f} GB are free; {remedies(config, processes.world_size)}."
        )
    micro, size = smallest
    if processes.is_main:
        print(
            f"micro-batch {micro} (of a share of {share}): {size / 1e9:.1f} of {room.total / 1e9:.0f} GB", flush=True
        )  # fmt: skip
    return with_micro_batch(config, micro)


def search(
    config: RunConfig, num_processes: int, usable: float, measure: Callable[[int], float] | None, *, device: str
) -> tuple[int, float] | None:
    """(micro-batch, bytes it takes) for the largest that fits into `usable` bytes; None where not one image does.

    `measure(micro_batch)` gives the bytes of activations that were really needed, or raises torch.OutOfMemoryError;
    without it the estimate is believed.
    """

    def estimate(micro: int) -> Memory:
        return memory_of(config, num_processes, micro_batch=micro, device=device)

    candidates = divisors(share_of_batch(config, num_processes))
    if measure is None:
        return next(((n, size) for n in candidates if (size := estimate(n).total) <= usable), None)
    for micro in _worth_trying(candidates, lambda n: estimate(n).total, usable):
        try:
            size = replace(estimate(micro), activations=measure(micro)).total
        except torch.OutOfMemoryError:
            continue
        if size <= usable:
            return micro, size
    return None


def _worth_trying(candidates: Sequence[int], estimate: Callable[[int], float], usable: float) -> list[int]:
    """From the first candidate that may fit if the estimate is a third too high; always the last one."""
    return [n for n in candidates if estimate(n) <= usable * 4 / 3] or [candidates[-1]]


def _room(device: torch.device) -> Room:
    """Free memory of a GPU, or this process's part of what its host has free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(free - (1 - USABLE) * total, total)
    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    group = Path("/sys/fs/cgroup")  # a container may have less than its host
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        total = min(total, int(limit))
        available = min(available, int(limit) - int((group / "memory.current").read_text()))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return Room(USABLE * available / local, total / local)


def _measure_on_gpu(
    config: RunConfig, processes: Processes, build: Callable[[], nn.Module]
) -> Callable[[int], float]:  # fmt: skip
    """A function that tries a micro-batch and gives the bytes it took beside the parameters."""
    device, engine = processes.device, config.engine
    dtype = DTYPES.get(engine.precision)
    network: nn.Module | None = None

    def measure(micro_batch: int) -> float:
        nonlocal network
        _free(device)
        if network is None:  # here, so that a network too large for the device counts as one that does not fit
            network = build().to(device).train()
            drop_gradients(network)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        x, time, conditions = random_inputs(config.model, micro_batch, device)
        if engine.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            output = network(x, time, *conditions)
        output.float().square().mean().backward()
        return torch.cuda.max_memory_allocated(device) - before

    return measure


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
