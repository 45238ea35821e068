"""IsoFLOP analysis (Hoffmann et al. 2022, approach 2): at equal training compute, the best size is where a parabola of
the value in log N has its minimum; power laws through the minima say how the best size and its data grow with compute.

Each slice's interval is the delta method's, by the scatter about its own parabola. The intervals of the laws are
percentiles over rounds in which whole runs are resampled (many runs) or their residuals turned over (few), as for
L(N, D): slices that are cut from the same learning curves are not independent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from evaluation.scaling.intervals.uncertainty import MIN_VALID_SHARE
from evaluation.scaling.points import Array, Interval, Point
from evaluation.scaling.sizes.isoflop_parabola import (
    Parabolas,
    base_weights,
    design_of,
    lines,
    log_images,
    minima_of,
    near_minimum,
    parabolas,
    rounds_of,
)
from evaluation.scaling.sizes.isoflop_slices import MIN_SIZES, Samples, curve_labels, find_slices

SliceStatus = Literal[
    "ok",
    "too_few_sizes",
    "edge",  # the minimum is not between the smallest and the largest size
    "not_convex",  # the parabola has no minimum
    "unidentified",  # the parabola's curvature is not larger than its error
]
Status = Literal["ok", "invalid", "no_slices", "too_few_minima"]
MIN_MINIMA = 3  # of a power law through them


@dataclass(frozen=True)
class Slice:
    """One budget: its points, the parabola's minimum, and how well it is determined."""

    budget: float  # FLOPs
    status: SliceStatus
    message: str  # empty for "ok"
    interpolated: bool  # on learning curves
    sizes: tuple[float, ...]  # of the points, as their images and values
    images: tuple[float, ...]
    values: tuple[float, ...]
    num_fitted_sizes: int  # those near enough to the minimum for a parabola
    optimal_size: float | None = None
    size_interval: Interval | None = None  # None where nothing says how far the values scatter
    optimal_images: float | None = None
    optimal_value: float | None = None
    value_stderr: float | None = None
    curvature: float | None = None  # d^2 value / d(ln N)^2

    def parabola(self, num_params: ArrayLike) -> Array:
        """The fitted value at sizes. Needs a minimum."""
        assert self.optimal_size is not None
        assert self.optimal_value is not None
        assert self.curvature is not None
        distance = np.log(np.asarray(num_params, dtype=float) / self.optimal_size)
        return np.asarray(self.optimal_value + self.curvature / 2 * distance**2)


@dataclass(frozen=True)
class OptimumLaw:
    """A power law of compute through the minima: y(C) = at_reference (C / reference_compute)^exponent."""

    exponent: float
    at_reference: float
    reference_compute: float  # geometric mean of the slices' budgets
    exponent_interval: Interval | None = None
    samples: Array = field(default_factory=lambda: np.empty((0, 2)), repr=False, compare=False)  # (log at, exponent)

    def __call__(self, compute: ArrayLike) -> Array:
        ratio = np.asarray(compute, dtype=float) / self.reference_compute
        return np.asarray(self.at_reference * ratio**self.exponent)

    def interval(self, compute: float, confidence: float = 0.95) -> Interval | None:
        """Percentile interval at one compute; None without rounds."""
        if len(self.samples) == 0:
            return None
        logs = self.samples[:, 0] + self.samples[:, 1] * np.log(compute / self.reference_compute)
        low, high = np.exp(np.percentile(logs, [50 * (1 - confidence), 50 * (1 + confidence)]))
        return float(low), float(high)


@dataclass(frozen=True)
class IsoFlop:
    """All slices, and N*(C) and D*(C) through the minima of those that have one."""

    status: Status
    message: str
    slices: tuple[Slice, ...]
    num_runs: int  # curves, where points of one size were joined to one
    confidence: float
    size_law: OptimumLaw | None = None
    images_law: OptimumLaw | None = None
    interval_message: str = ""  # why the laws' intervals are absent or in doubt; empty where they are not

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the bootstrap's single rounds."""
        value = dataclasses.asdict(self)
        for name in ("size_law", "images_law"):
            if value[name] is not None:
                del value[name]["samples"]
        return value


def isoflop(
    points: Sequence[Point],
    *,
    budgets: Sequence[float] | None = None,
    num_budgets: int = 8,
    num_rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> IsoFlop:
    """Parabolas at equal compute, and power laws through their minima.

    Args:
        points: of one metric, with sizes and images; a run's points are its learning curve.
        budgets: training FLOPs; None: see `find_slices`.
        num_budgets: how many slices of learning curves.
        num_rounds, confidence, seed: of the bootstrap over runs.
    """
    table = np.array([(p.compute, p.num_params, p.images, p.value) for p in points], dtype=float).reshape(-1, 4)
    num_bad = int((~(np.isfinite(table) & (table > 0)).all(axis=1)).sum())
    if num_bad or not points:
        message = f"{num_bad} of {len(table)} points lack a compute, size, images or value, finite and positive."
        return IsoFlop("invalid", message if points else "there are no points.", (), 0, confidence)
    samples = find_slices(points, budgets, num_budgets)
    num_runs = int(curve_labels(points).max()) + 1
    near = [s.subset(near_minimum(s)) for s in samples]
    slices = tuple(_slice(*pair, confidence) for pair in zip(samples, near, strict=True))
    result = IsoFlop("ok", "", slices, num_runs, confidence)
    if not slices:
        message = f"at no compute do {MIN_SIZES} sizes meet: there is nothing to compare at equal compute."
        return dataclasses.replace(result, status="no_slices", message=message)
    used = [s for s, found in zip(near, slices, strict=True) if found.status == "ok"]
    if len(used) < MIN_MINIMA or np.ptp(np.log([s.budget for s in used])) < np.log(2):
        message = f"{len(used)} of {len(slices)} slices have a minimum: too few, or too near, for a power law."
        return dataclasses.replace(result, status="too_few_minima", message=message)
    rounds, doubt = rounds_of(used, num_runs, num_rounds, seed)
    size_law, images_law = (_law(used, rounds[:, :, k], minima_of(used)[:, k], confidence) for k in (0, 1))
    return dataclasses.replace(result, size_law=size_law, images_law=images_law, interval_message=doubt)


def _slice(every: Samples, s: Samples, confidence: float) -> Slice:
    """A budget's slice: of every sample, with the parabola of those near the minimum."""
    sizes, images = np.exp(every.log_n).tolist(), np.exp(every.log_d).tolist()
    bare = Slice(
        s.budget, "ok", "", s.interpolated, tuple(sizes), tuple(images), tuple(every.value.tolist()), s.num_sizes
    )
    if s.num_sizes < MIN_SIZES:
        message = f"{s.num_sizes} sizes at this compute; a parabola needs {MIN_SIZES}."
        return dataclasses.replace(bare, status="too_few_sizes", message=message)
    weights = base_weights(s)
    fit = parabolas(s, s.value, weights[None])
    c0, c1, c2 = fit.coefficients[0]
    if not c2 > 0:
        return dataclasses.replace(bare, status="not_convex", message="the values have no minimum along size.")
    log_size = float(fit.log_size[0])
    if not s.log_n.min() <= log_size <= s.log_n.max():
        end = "smallest" if log_size < s.log_n.min() else "largest"
        return dataclasses.replace(bare, status="edge", message=f"the {end} size is best: the minimum lies beyond it.")
    found = dataclasses.replace(
        bare,
        optimal_size=float(np.exp(log_size)),
        optimal_images=float(np.exp(log_images(s, np.array(log_size)))),
        optimal_value=float(c0 - c1**2 / (4 * c2)),
        curvature=float(2 * c2 / fit.width**2),
    )
    return _with_errors(found, s, fit, weights, confidence)


def _with_errors(found: Slice, s: Samples, fit: Parabolas, weights: Array, confidence: float) -> Slice:
    """The delta method's errors of the minimum, by the scatter about the parabola and the values' own errors."""
    dof = len(s.value) - 3
    if dof == 0 and s.stderr is None:
        return found
    design, _, width = design_of(s)
    residual = s.value - fit.at(s.log_n)[0]
    noise = float(np.sum(weights * residual**2)) / dof if dof > 0 else 1.0
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design)) * (
        noise if s.stderr is None else max(1.0, noise)
    )
    quantile = (
        float(special.stdtrit(dof, (1 + confidence) / 2)) if dof > 0 else float(special.ndtri((1 + confidence) / 2))
    )
    _, c1, c2 = fit.coefficients[0]
    if c2 <= quantile * np.sqrt(covariance[2, 2]):
        return dataclasses.replace(found, status="unidentified", message="the curvature is not larger than its error.")
    by_position = np.array([0.0, -1 / (2 * c2), c1 / (2 * c2**2)])
    by_value = np.array([1.0, -c1 / (2 * c2), c1**2 / (4 * c2**2)])
    reach = quantile * width * float(np.sqrt(by_position @ covariance @ by_position))
    assert found.optimal_size is not None
    return dataclasses.replace(
        found,
        size_interval=(float(found.optimal_size * np.exp(-reach)), float(found.optimal_size * np.exp(reach))),
        value_stderr=float(np.sqrt(by_value @ covariance @ by_value)),
    )


def _law(used: Sequence[Samples], rounds: Array, minima: Array, confidence: float) -> OptimumLaw:
    """The line through the logarithms of the minima [slices], and through those of every round [R, slices]."""
    x = np.log([s.budget for s in used])
    reference = float(x.mean())
    level, exponent = lines(x - reference, minima[None])[0]
    samples = lines(x - reference, rounds)
    valid = samples[np.isfinite(samples).all(axis=1)]
    interval = None
    if len(valid) and len(valid) >= MIN_VALID_SHARE * len(samples):
        low, high = np.percentile(valid[:, 1], [50 * (1 - confidence), 50 * (1 + confidence)])
        interval = (float(low), float(high))
    else:
        valid = valid[:0]
    return OptimumLaw(float(exponent), float(np.exp(level)), float(np.exp(reference)), interval, valid)
