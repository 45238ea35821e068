"""How a run is computed, beside what: the same layout goes on bit for bit, another one to rounding."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from trainer.config.run import RunConfig
from trainer.processes import Processes

# Of the section `engine`: what neither touches a figure nor the order in which figures are added up.
_NO_MATTER = {"peak_flops", "profile_steps", "hang_seconds", "num_cpu_threads"}


def layout_of(config: RunConfig, processes: Processes, *, micro_batch: int) -> dict[str, Any]:
    """What a checkpoint says of those who wrote it."""
    engine = {k: v for k, v in config.engine.model_dump(mode="json").items() if k not in _NO_MATTER}
    device = processes.device
    return {
        "num_processes": processes.world_size,
        "num_threads": torch.get_num_threads(),
        "micro_batch": micro_batch,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        **engine,
        "versions": {name: version(name) for name in ("torch", "deepspeed")} | {"python": platform.python_version()},
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two layouts, such as "zero_stage 1 -> 3"; "" if nothing that both know."""
    return ", ".join(f"{k} {before[k]} -> {now[k]}" for k in now if k in before and before[k] != now[k])
