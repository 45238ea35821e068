"""Streaming mean and covariance of feature vectors: float64, mergeable, numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.errors import DataError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of vectors; the vectors too, while they are few."""

    mean: Array  # [dim]
    covariance: Array  # [dim, dim], unbiased (divided by N - 1)
    vectors: Array | None = None  # [N, dim] where N <= dim: the covariance is singular, distances are exact from these

    @property
    def dim(self) -> int:
        return len(self.mean)


class Moments:
    """Count, mean and scatter matrix of a stream of vectors; the vectors too, while they are few.

    Batches are merged by the pairwise update of Chan, Golub & LeVeque 1979 ("Updating formulae and a pairwise
    algorithm for computing sample variances"): scatter is always about the mean, so nothing cancels, and any way of
    cutting or ordering the stream gives the same result to float64 rounding.

    While `num <= dim` the covariance is singular and its square root ill-conditioned; the vectors themselves are then
    kept (no more than `dim` of them: the memory of one covariance) so that distances stay exact.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.num = 0
        self.mean: Array = np.zeros(dim)
        self.scatter: Array = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T
        self._kept: list[Array] | None = []

    def add(self, features: ArrayLike) -> None:
        """Add vectors [N, dim].

        Raises:
            DataError: wrong shape, or a value that is not finite.
        """
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise DataError(f"features of shape [N, {self.dim}] are expected, not {list(x.shape)}.")
        if not np.isfinite(x).all():
            bad = int((~np.isfinite(x).all(axis=1)).sum())
            raise DataError(f"{bad} of {len(x)} feature vectors are not finite: the images or the network are damaged.")
        if len(x) == 0:
            return
        mean = x.mean(axis=0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred, [x.copy()])

    def merge(self, other: Moments) -> None:
        """Add all that `other` has seen."""
        if other.dim != self.dim:
            raise DataError(f"moments of {other.dim} and {self.dim} dimensions cannot be merged.")
        if other.num:
            self._merge(other.num, other.mean, other.scatter, other._kept)

    def _merge(self, num: int, mean: Array, scatter: Array, kept: list[Array] | None) -> None:
        total = self.num + num
        delta = mean - self.mean
        self.scatter += scatter
        if self.num:
            self.scatter += np.outer(delta, delta * (self.num * num / total))
        self.mean = self.mean + delta * (num / total)
        self.num = total
        can_keep = self._kept is not None and kept is not None and total <= self.dim
        self._kept = [*self._kept, *kept] if can_keep else None  # type: ignore[misc]

    @property
    def features(self) -> Array | None:
        """The vectors [num, dim] while `num <= dim`, else None."""
        if self._kept is None:
            return None
        return np.concatenate(self._kept) if self._kept else np.zeros((0, self.dim))

    @property
    def covariance(self) -> Array:
        """Unbiased covariance [dim, dim] (divided by num - 1).

        Raises:
            DataError: fewer than two vectors.
        """
        if self.num < 2:
            raise DataError(f"a covariance needs at least 2 images, not {self.num}.")
        return self.scatter / (self.num - 1)

    def gaussian(self) -> Gaussian:
        """Close the stream.

        Raises:
            DataError: fewer than two vectors.
        """
        return Gaussian(self.mean, self.covariance, self.features)


def moments_of(features: ArrayLike) -> Moments:
    """Moments of vectors [N, dim] that are in memory."""
    x = np.asarray(features, dtype=np.float64)
    moments = Moments(x.shape[-1])
    moments.add(x)
    return moments
