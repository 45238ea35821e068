"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991).

A set's manifold is the union of balls around its features, each as large as the distance to its k-th nearest
neighbour. Precision is the share of samples within the manifold of the real images, recall the share of real images
within that of the samples; a distance equal to the radius is within. k = 3, as in ADM's evaluator.

Distances are computed blockwise, so memory does not depend on the number of images, and in float64: in float32 the
rounding of |u|^2 + |v|^2 - 2 u.v (some 1e-6 of a distance) moves about one in 200,000 images across a border, so that
block sizes and devices would show in the last digits. Features come in float32, whose products are exact in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import DataError

Rows = NDArray[np.float32] | NDArray[np.float64]

NEIGHBOURS = 3
_BLOCK = 2048  # rows of either set at once: 32 MiB of distances
_SAME = 1e-13  # of |u|^2 + |v|^2: below it, a squared distance is rounding


def precision_recall(
    samples: Rows, reference: Rows, *, k: int = NEIGHBOURS, device: str | torch.device = "cpu", block: int = _BLOCK
) -> tuple[float, float]:
    """Precision and recall of features [N, d] against those of real images [M, d]; memory maps will do.

    Raises:
        DataError: a set of no more than k images, features of different dimensions or not finite.
    """
    if samples.shape[1] != reference.shape[1]:
        raise DataError(f"features of {samples.shape[1]} and {reference.shape[1]} dimensions cannot be compared.")
    sample_radii = squared_radii(samples, k=k, device=device, block=block)
    real_radii = squared_radii(reference, k=k, device=device, block=block)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for s, sample_part in _blocks(samples, block, device):
        for r, real_part in _blocks(reference, block, device):
            distances = squared_distances(sample_part, real_part)  # [samples, real]
            precise[s] |= (distances <= real_radii[r]).any(dim=1)
            recalled[r] |= (distances <= sample_radii[s, None]).any(dim=0)
    return float(precise.double().mean()), float(recalled.double().mean())


def squared_radii(x: Rows, *, k: int, device: str | torch.device = "cpu", block: int = _BLOCK) -> Tensor:
    """Squared distance of each of the features [N, d] to its k-th nearest other one: [N], float64.

    Raises:
        DataError: no more than k features, or some that are not finite.
    """
    if len(x) <= k:
        raise DataError(f"precision and recall with k = {k} need at least {k + 1} images, not {len(x)}.")
    radii = torch.empty(len(x), dtype=torch.float64, device=device)
    for rows, part in _blocks(x, block, device):
        if not part.isfinite().all():
            raise DataError("features that are not finite have no neighbours: the images or the network are damaged.")
        nearest = torch.empty(len(part), 0, dtype=torch.float64, device=device)
        for _, others in _blocks(x, block, device):
            candidates = torch.cat([nearest, squared_distances(part, others)], dim=1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values
        radii[rows] = nearest.amax(dim=1)  # of k + 1 distances the smallest, 0, is that to itself
    return radii


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """Of float64 vectors [n, d] and [m, d], all pairs: [n, m]; exactly 0 for equal vectors."""
    squares = u.square().sum(dim=1)[:, None] + v.square().sum(dim=1)
    distances = torch.addmm(squares, u, v.T, alpha=-2)
    return distances.masked_fill_(distances <= _SAME * squares, 0.0)


def _blocks(x: Rows, size: int, device: str | torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows on the device in float64, with where they are."""
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, torch.from_numpy(np.array(x[rows])).to(device).double()
