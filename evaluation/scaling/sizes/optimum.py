"""What size for a budget: the compute-optimal N*(C), D*(C) and L*(C) of a fitted L(N, D), and the best of given sizes.

Training compute is what an image costs times the images seen, C = kappa N^gamma D; for language models kappa = 6 and
gamma = 1, for a ladder of UNets gamma is fitted to the points. Then L(N, C / (kappa N^gamma)) has its minimum at

    N* = (alpha A / (gamma beta B))^(1 / s) (C / kappa)^(beta / s),    s = alpha + gamma beta,

which is equation 4 of Hoffmann et al. 2022 where gamma = 1; there N* ~ C^(beta / (alpha + beta)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.errors import DataError, UserError
from evaluation.scaling.points import Array, Interval, Point
from evaluation.scaling.sizes.distinct import distinct
from evaluation.scaling.sizes.size_data import SizeDataFit

POOR_COST = 0.1  # a worst error of the cost law beyond this is said aloud


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of one image as a power law of the size: kappa N^gamma."""

    log_kappa: float
    gamma: float
    worst_error: float  # largest |law - point| / point over the points
    flop_convention: str

    def per_image(self, num_params: ArrayLike) -> Array:
        """FLOPs of one image (or token) at sizes of any shape."""
        return np.asarray(np.exp(self.log_kappa + self.gamma * np.log(np.asarray(num_params, dtype=float))))

    @property
    def kappa(self) -> float:
        return float(np.exp(self.log_kappa))


@dataclass(frozen=True)
class Rung:
    """One of the study's own sizes, trained for the whole budget."""

    num_params: int
    images: float
    value: float
    interval: Interval | None
    share_best: float | None  # of the bootstrap's rounds, those in which this size is the best of the rungs


@dataclass(frozen=True)
class Optimum:
    """The answer for one budget, by L(N, D)."""

    compute: float
    num_params: float
    images: float
    value: float
    num_params_interval: Interval | None  # None without a bootstrap
    images_interval: Interval | None
    value_interval: Interval | None
    # Beyond the largest of the points; at most 1 means that nothing is extrapolated.
    compute_factor: float
    size_factor: float
    images_factor: float
    rungs: tuple[Rung, ...]  # by size
    warnings: tuple[str, ...]

    @property
    def best_rung(self) -> Rung:
        return min(self.rungs, key=lambda rung: rung.value)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "best_rung": dataclasses.asdict(self.best_rung)}


def budget_flops(*, gpu_hours: float, peak_flops: float, utilization: float) -> float:
    """Training FLOPs of so many GPU hours, at this share of a GPU's peak.

    Args:
        peak_flops: FLOPs a second of one GPU, by the points' convention (2 per multiply-add).
        utilization: model FLOPs utilization (MFU), between 0 and 1.

    Raises:
        UserError: a number out of its range.
    """
    for name, value in (("--gpu-hours", gpu_hours), ("--peak-flops", peak_flops)):
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value:g} is not a positive number.")
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization {utilization:g} is not between 0 and 1; 0.3 means 30 % of the peak.")
    return gpu_hours * 3600 * peak_flops * utilization


def fit_cost(points: Sequence[Point]) -> Cost:
    """The power law of an image's training FLOPs in the size, by least squares of logarithms over sizes.

    Raises:
        DataError: a point without compute, size or images, or fewer than two sizes.
    """
    table = np.array([(p.num_params, p.images, p.compute) for p in points], dtype=float).reshape(-1, 3)
    if len(table) == 0 or not (np.isfinite(table) & (table > 0)).all():
        raise DataError("what an image costs needs the size, the images seen and the compute of every point.")
    log_n, log_cost = np.log(table[:, 0]), np.log(table[:, 2] / table[:, 1])
    size = distinct(log_n)
    if size.max() == 0:
        raise DataError("what an image costs at other sizes needs points of at least two sizes.")
    gamma, log_kappa = np.polyfit(_means(log_n, size), _means(log_cost, size), 1)
    error = float(np.abs(np.expm1(log_kappa + gamma * log_n - log_cost)).max())
    return Cost(float(log_kappa), float(gamma), error, points[0].flop_convention)


def optimum(fit: SizeDataFit, points: Sequence[Point], compute: float, *, cost: Cost | None = None) -> Optimum:
    """The best size, images and value for a budget, with the intervals of the fit's bootstrap.

    Args:
        points: those of the fit.
        compute: training FLOPs, by the points' convention.
        cost: what an image costs; None: fitted to the points.

    Raises:
        DataError: the fit has no curve (its message says why).
        UserError: a compute that is not positive.
    """
    if fit.curve is None:
        raise DataError(f"there is no L(N, D) to ask ({fit.status}): {fit.message}")
    if not (np.isfinite(compute) and compute > 0):
        raise UserError(f"a budget of {compute:g} FLOPs is not a positive number.")
    cost = cost or fit_cost(points)
    curve = fit.curve
    own = np.array([[curve.E, curve.log_A, curve.alpha, curve.log_B, curve.beta]])
    log_n, log_d, value = (float(x[0]) for x in best(own, cost, compute))
    by_size = by_images = by_value = None
    if fit.bootstrap is not None and len(fit.bootstrap.samples):
        rounds = best(fit.bootstrap.samples, cost, compute)
        by_size, by_images = (_pair(fit.bootstrap.interval(np.exp(logs))) for logs in rounds[:2])
        by_value = _pair(fit.bootstrap.interval(rounds[2]))
    factors = (
        compute / max(p.compute for p in points),
        float(np.exp(log_n)) / max(p.num_params for p in points),
        float(np.exp(log_d)) / max(p.images for p in points),
    )
    return Optimum(
        compute, float(np.exp(log_n)), float(np.exp(log_d)), value, by_size, by_images, by_value, *factors,
        rungs=_rungs(fit, points, compute), warnings=tuple(_warnings(fit, cost, factors)),
    )  # fmt: skip


def best(parameters: Array, cost: Cost, compute: float) -> tuple[Array, Array, Array]:
    """log N*, log D* and L* [R] for parameters (E, log A, alpha, log B, beta) [R, 5]."""
    constant, log_a, alpha, log_b, beta = parameters.T
    log_budget = np.log(compute) - cost.log_kappa
    total = alpha + cost.gamma * beta
    log_n = (np.log(alpha) + log_a - np.log(cost.gamma * beta) - log_b + beta * log_budget) / total
    log_d = log_budget - cost.gamma * log_n
    return log_n, log_d, constant + np.exp(log_a - alpha * log_n) + np.exp(log_b - beta * log_d)


def _rungs(fit: SizeDataFit, points: Sequence[Point], compute: float) -> tuple[Rung, ...]:
    """Every size of the points with the images that the budget buys, by what its own points cost."""
    assert fit.curve is not None
    size = distinct(np.log([p.num_params for p in points]))
    sizes = np.rint(np.exp(_means(np.log([p.num_params for p in points]), size)))
    images = compute / np.exp(_means(np.log([p.compute / p.images for p in points]), size))
    values = fit.curve(sizes, images)
    intervals: list[Interval | None] = [None] * len(sizes)
    shares: list[float | None] = [None] * len(sizes)
    if fit.bootstrap is not None and len(fit.bootstrap.samples):
        rounds = fit.bootstrap.predict(sizes, images)  # [V, sizes]
        low, high = fit.bootstrap.interval(rounds)
        intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        shares = list(np.bincount(rounds.argmin(axis=1), minlength=len(sizes)) / len(rounds))
    rows = zip(sizes.tolist(), images.tolist(), values.tolist(), intervals, shares, strict=True)
    return tuple(Rung(int(n), d, y, i, None if s is None else float(s)) for n, d, y, i, s in rows)


def _means(values: Array, labels: NDArray[np.int64]) -> Array:
    """The mean of the values [n] with each label."""
    return np.asarray(np.bincount(labels, weights=values) / np.bincount(labels))


def _warnings(fit: SizeDataFit, cost: Cost, factors: tuple[float, float, float]) -> list[str]:
    """Every reason to doubt the answer."""
    found = []
    if fit.status != "ok":
        found.append(f"the fit of L(N, D) is {fit.status}: {fit.message}")
    if fit.outliers:
        found.append(f"{len(fit.outliers)} of {fit.num_points} points lie far off the law.")
    if fit.bootstrap is not None and fit.bootstrap.status != "ok":
        found.append(f"intervals: {fit.bootstrap.message}")
    for name, factor in zip(("compute", "size", "number of images"), factors, strict=True):
        if factor > 1:
            found.append(f"extrapolated: the {name} is {factor:.3g} times the largest that was measured.")
    if cost.worst_error > POOR_COST:
        found.append(f"what an image costs is no power law of the size: off by up to {cost.worst_error:.0%}.")
    return found


def _pair(ends: tuple[Array, Array]) -> Interval:
    return float(ends[0]), float(ends[1])
