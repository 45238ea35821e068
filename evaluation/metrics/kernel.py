"""The kernel distance, KID in Inception features (Bińkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401).

    MMD^2(x, y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
    k(a, b) = (a . b / d + 1)^3

It is unbiased at any number of images and can therefore be slightly negative. The value is the mean over random subsets
of both sets. All is computed in float64: three means of order one cancel to a few thousandths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator
from data_pipeline.errors import DataError

Array = NDArray[np.float64]
Rows = NDArray[np.float32] | Array

NUM_SUBSETS = 100
SUBSET_SIZE = 1000


@dataclass(frozen=True)
class KernelDistance:
    """The mean over subsets, and how they scatter."""

    value: float
    stderr: float
    std: float  # over the subsets (other tools print this one after the ±)
    num_subsets: int
    subset_size: int


def kernel_distance(
    x: Rows, y: Rows, *, num_subsets: int = NUM_SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Kernel distance of two sets of features [N, d] and [M, d]; they may lie on disk (memory maps).

    The rows of subset i are a function of (seed, i) and the numbers of rows alone. Subsets of all rows of both sets
    would be the same one: then there is one.

    The standard error has two parts. Both sets are samples: all pairs of N and M rows give a value whose variance is
    4 (var w(x) / N + var w(y) / M) to first order in 1/N, 1/M, with w the rows' witness values (see `witness`; theirs
    come from the subsets). And B subsets are not all pairs: the variance over the subsets divided by B. For equal
    distributions, where the true variance falls with 1/N^2, it is too wide.

    Raises:
        DataError: subsets larger than a set or below two rows, fewer than two, features of different dimensions or not
            finite.
    """
    num = min(len(x), len(y))
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared.")
    if num_subsets < 2 or not 2 <= subset_size <= num:
        raise DataError(
            f"{num_subsets} subsets of {subset_size} images: a kernel distance of {len(x)} and {len(y)} images needs "
            f"two subsets or more, of 2 to {num} images."
        )
    if subset_size == len(x) == len(y):
        num_subsets = 1
    values, variances = np.empty(num_subsets), np.empty((num_subsets, 2))
    for subset in range(num_subsets):
        of_x, of_y = witness(_subset(x, subset_size, seed, subset, 0), _subset(y, subset_size, seed, subset, 1))
        values[subset] = of_x.mean() + of_y.mean()
        variances[subset] = of_x.var(ddof=1), of_y.var(ddof=1)
    if not np.isfinite(values).all():
        raise DataError("the kernel distance is not finite: the features hold NaN or are far too large.")
    of_sets = 4 * float(variances.mean(axis=0) @ [1 / len(x), 1 / len(y)])
    of_subsets = float(values.var(ddof=1)) / num_subsets if num_subsets > 1 else 0.0
    stderr = (of_sets + of_subsets) ** 0.5
    return KernelDistance(float(values.mean()), stderr, float(values.std()), num_subsets, subset_size)


def witness(x: Array, y: Array) -> tuple[Array, Array]:
    """How much nearer each row is to its own set than to the other: [N] of features [N, d] and [M] of [M, d].

    mean_{i != j} k(x_j, x_i) - mean_j k(y_j, x_i), and likewise of y. The sum of both means is the unbiased estimate
    of the squared maximum mean discrepancy.
    """
    within_x, within_y = (_off_diagonal_means(polynomial_kernel(z, z)) for z in (x, y))
    between = polynomial_kernel(x, y)
    return within_x - between.mean(axis=1), within_y - between.mean(axis=0)


def polynomial_kernel(x: Array, y: Array) -> Array:
    """(x . y / d + 1)^3 of all pairs: [N, M]."""
    base = x @ y.T / x.shape[1] + 1
    cubes: Array = base * base * base
    return cubes


def _off_diagonal_means(kernel: Array) -> Array:
    means: Array = (kernel.sum(axis=1) - np.diagonal(kernel)) / (len(kernel) - 1)
    return means


def _subset(rows: Rows, size: int, seed: int, subset: int, side: int) -> Array:
    """`size` different rows of one of the two sets, in float64."""
    rng = generator(seed, Stream.KERNEL_SUBSET, subset, part=side)
    chosen = np.sort(rng.choice(len(rows), size, replace=False))  # in the order of the disk
    return np.asarray(rows[chosen], dtype=np.float64)
