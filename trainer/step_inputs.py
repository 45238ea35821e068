"""What one training step consumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.labels, self.u, self.noise

    def split(self, size: int) -> Iterator[StepInputs]:
        """Micro-batches of `size` images."""
        for images, labels, u, noise in zip(*(x.split(size) for x in self._tensors), strict=True):
            yield StepInputs(images, labels, u, noise)

    def pin_memory(self) -> StepInputs:
        """In memory from which a device copies by itself."""
        images, labels, u, noise = (x.pin_memory() for x in self._tensors)
        return StepInputs(images, labels, u, noise, self.damaged)

    def to(self, device: torch.device) -> StepInputs:
        """On the device; from pinned memory the copies overlap with computing."""
        images, labels, u, noise = (x.to(device, non_blocking=True) for x in self._tensors)
        return StepInputs(images, labels, u, noise)
