"""The noise of samples: sample i's from a generator of its own seed, whoever else is in the batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data_pipeline.counter_rng import Stream, generator

SLICES = 4  # of a batch, filled side by side


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(SLICES, os.cpu_count() or 1), thread_name_prefix="noise")


class SampleNoise:
    """Standard normal noise for a batch of samples, one tensor after the other.

    Drawn on the host, so that a sample's noise has the same bits on every device, in any batch, on any number of
    processes. From the second call on the next tensor is drawn in the background, while the network computes.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], *,
        seed: int = 0, stage: int = 0, device: torch.device | str = "cpu", stream: Stream = Stream.SAMPLE,
    ) -> None:  # fmt: skip
        """`seed`, `stage` (of a cascade) and `stream` name independent families of noise for the same numbers."""
        self._generators = [generator(seed, stream, s, part=stage) for s in seeds]
        self._shape = shape
        self._device = torch.device(device)
        self._num_calls = 0
        self._next: tuple[Tensor, list[Future[None]]] | None = None

    def __call__(self) -> Tensor:
        """The next noise of every sample: [B, C, H, W] float32."""
        noise, filled = self._next or self._begin()
        for part in filled:
            part.result()
        self._num_calls += 1
        self._next = self._begin() if self._num_calls > 1 else None  # x_T alone is all that some samplers need
        return noise.to(self._device, non_blocking=True)

    def _begin(self) -> tuple[Tensor, list[Future[None]]]:
        pinned = self._device.type == "cuda"
        noise = torch.empty(len(self._generators), *self._shape, pin_memory=pinned)
        rows, size = noise.numpy(), max(1, -(-len(noise) // SLICES))
        starts = range(0, len(noise), size)
        return noise, [_pool().submit(self._fill, rows, start, start + size) for start in starts]

    def _fill(self, rows: np.ndarray, start: int, stop: int) -> None:
        for row, own in zip(rows[start:stop], self._generators[start:stop], strict=True):
            own.standard_normal(out=row, dtype=np.float32)
