"""A feature net that is quick to compute and to check: colours, their spread over the image, and classes by colour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.chunks import Arrays
from evaluation.features import Features

DIM, SPATIAL_DIM, NUM_CLASSES = 3, 4, 3


@dataclass
class ToyNet:
    """Mean colour; the mean of four quarters; probabilities of red, green and blue."""

    name: str = "inception"
    dim: int = DIM
    spatial_dim: int = SPATIAL_DIM
    num_classes: int = NUM_CLASSES
    weights_sha256: str = "0" * 64
    resize: int = 8
    calls: list[int] = field(default_factory=list)

    def __call__(self, images: Tensor) -> Features:
        self.calls.append(len(images))
        x = images.float()
        pool = x.mean(dim=(2, 3))
        if not self.spatial_dim:
            return Features(pool)
        halves = [half for rows in x.chunk(2, dim=2) for half in rows.chunk(2, dim=3)]
        spatial = torch.stack([half.mean(dim=(1, 2, 3)) for half in halves], dim=1)
        return Features(pool, spatial, (pool / 40).softmax(dim=1))


def bare_net(name: str = "efflite0") -> ToyNet:
    """One without spatial features or classes."""
    return ToyNet(name=name, spatial_dim=0, num_classes=0)


def some_images(num: int, seed: int = 0, *, size: int = 8, low: int = 0) -> NDArray[np.uint8]:
    """uint8 [num, size, size, 3] that differ from each other in colour."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(low, 200, (num, 1, 1, 3))
    return (colour + rng.integers(0, 50, (num, size, size, 3))).astype(np.uint8)


def in_parts(arrays: Arrays, sizes: list[int]) -> Iterator[Arrays]:
    """Arrays cut into parts of these sizes, the rest in a last one."""
    start = 0
    for size in [*sizes, len(arrays["pool"])]:
        rows = slice(start, start + size)
        start += size
        yield {name: array[rows] for name, array in arrays.items()}
