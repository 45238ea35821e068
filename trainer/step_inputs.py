"""What one training step consumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """One process's share of a global batch, b images, on the host."""

    images: Tensor  # [b, C, H, W] uint8
    labels: Tensor  # [b] int64, -1 where unlabelled or dropped
    u: Tensor  # [b] float64 in [0, 1): decides the timestep
    noise: Tensor  # [b, C, H, W] float32
    damaged: dict[int, str] = field(default_factory=dict)  # samples that gave way to substitutes, and why
    low_res_step: Tensor | None = None  # [b] int64: how noisy low-resolution images are to be, where they are
    low_res_noise: Tensor | None = None  # [b, C, h, w] float32: of that

    @property
    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def split(self, size: int) -> Iterator[StepInputs]:
        """Micro-batches of `size` images."""
        names = self._tensors.keys()
        for parts in zip(*(x.split(size) for x in self._tensors.values()), strict=True):
            yield StepInputs(**dict(zip(names, parts, strict=True)))

    def pin_memory(self) -> StepInputs:
        """In memory from which a device copies by itself."""
        return replace(self, **{name: x.pin_memory() for name, x in self._tensors.items()})

    def to(self, device: torch.device) -> StepInputs:
        """On the device; from pinned memory the copies overlap with computing."""
        return StepInputs(**{name: x.to(device, non_blocking=True) for name, x in self._tensors.items()})
