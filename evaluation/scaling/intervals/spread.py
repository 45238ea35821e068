"""How much values scatter: between runs that are alike but for their seed, and along one run. All in log value.

From seeds: runs of one size by the computes they were evaluated at are a two-way layout, and its mean squares are the
estimates: of run levels, and of what is left when levels and the means of the computes are taken out.
Without repeated seeds the spread between runs shows only in how far runs lie from a law they all should follow, and
that needs more runs than the law has parameters. A law through few single-seed curves says nothing of it: then it must
be given, or the intervals are not calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.points import Array, Columns, Point, columns
from evaluation.scaling.seeds import mean_names

SpreadSource = Literal["given", "seeds", "residuals", "unknown"]
MIN_DOF = 3  # with fewer degrees of freedom a standard deviation is hardly known at all


@dataclass(frozen=True)
class Spread:
    """Standard deviations of log value with their degrees of freedom (infinite: taken as known)."""

    between: float  # of a run's level: its mean over its points, what it has of the scatter along the run included
    between_dof: float
    within: float  # of single points about their run's level
    within_dof: float
    source: SpreadSource  # of the spread between runs


class Smoother:
    """Smooths log values along each run of some points: a polynomial in log compute, or nothing for short runs.

    Cubic where a run has six points or more, quadratic at five, and the points as they are below.
    """

    def __init__(self, c: Columns) -> None:
        self.degrees_of_freedom = np.bincount(c.run, minlength=len(c.runs))  # taken, by run
        self._projections: list[tuple[NDArray[np.int64], Array]] = []
        for run, size in enumerate(self.degrees_of_freedom.tolist()):
            own = np.flatnonzero(c.run == run)
            degree = 3 if size >= 6 else 2
            x = np.log(c.compute[own])
            if size < 5 or len(np.unique(x)) <= degree:
                continue
            q, _ = np.linalg.qr(np.vander((x - x.mean()) / x.std(), degree + 1))
            self._projections.append((own, q))
            self.degrees_of_freedom[run] = degree + 1

    def __call__(self, log_values: Array) -> Array:
        """Smooth values [R, n] of log values [R, n]."""
        smooth = np.array(log_values)
        for own, q in self._projections:
            smooth[:, own] = (log_values[:, own] @ q) @ q.T
        return smooth


def spread_of_curves(points: Sequence[Point], given: float | None = None) -> Spread:
    """The spread of runs about curves of their own: from repeated seeds, or given.

    Args:
        points: of the runs themselves (not averaged over seeds), positive and finite.
        given: standard deviation of log value between runs that differ in seed alone, known from elsewhere.
    """
    layout = _seed_layout(points)
    within, within_dof = layout.within, float(layout.within_dof)
    if within_dof < MIN_DOF:  # hardly repeated: what a run's own smooth curve leaves
        within, within_dof = _along_curves(columns(points))
    if given is not None:
        per_run = len(points) / max(1, len({p.run for p in points}))
        return Spread(float(np.hypot(given, within / np.sqrt(per_run))), np.inf, within, within_dof, "given")
    if layout.between_dof >= 1:
        return Spread(layout.between, layout.between_dof, within, within_dof, "seeds")
    return Spread(within, 0, within, within_dof, "unknown")


def spread_about_law(
    c: Columns, log_residual: Array, num_parameters: int, given: float | None = None, scale: Array | None = None
) -> Spread:
    """The spread of the runs in `c` about a law that all their points should follow.

    Args:
        log_residual: log value minus log law [n].
        num_parameters: of the law: degrees of freedom that it took.
        scale: relative size of each point's scatter [n], which the spread is in units of; default: all alike.
    """
    scale = np.ones(len(c.value)) if scale is None else scale
    counts = np.bincount(c.run)
    weight = scale**-2.0
    level = np.bincount(c.run, weights=weight * log_residual) / np.bincount(c.run, weights=weight)
    rest = (log_residual - level[c.run]) / scale
    level = level / run_scales(c, scale)
    between_dof, within_dof = len(counts) - num_parameters, len(log_residual) - len(counts)
    within = float(np.sqrt(rest @ rest / within_dof)) if within_dof > 0 else 0.0
    if given is not None:
        own = within / np.sqrt(np.exp(np.log(counts).mean()))
        return Spread(float(np.hypot(given, own)), np.inf, within, max(within_dof, 1), "given")
    if between_dof >= 1:
        return Spread(float(np.sqrt(level @ level / between_dof)), between_dof, within, max(within_dof, 1), "residuals")
    together = log_residual / scale
    everything = float(np.sqrt(together @ together / max(1, len(together) - num_parameters)))
    return Spread(everything, 0, within, max(within_dof, 1), "unknown")


def run_scales(c: Columns, scale: Array) -> Array:
    """The relative size of the scatter of each run's level [runs], from that of its points [n]."""
    return np.asarray(np.sqrt(np.bincount(c.run, weights=scale**2) / np.bincount(c.run)))


def _along_curves(c: Columns) -> tuple[float, float]:
    """Standard deviation of points about their own smooth curve, and its degrees of freedom."""
    smoother, log_value = Smoother(c), np.log(c.value)
    residual = log_value - smoother(log_value[None])[0]
    dof = float(len(residual) - smoother.degrees_of_freedom.sum())
    if dof >= 1:
        return float(np.sqrt(residual @ residual / dof)), dof
    if c.stderr is not None:  # runs of few points: what their evaluations say of themselves
        return float(np.sqrt(np.mean((c.stderr / c.value) ** 2))), 1.0
    return 0.0, 1.0


@dataclass(frozen=True)
class _Layout:
    """Runs of a size by computes, where several seeds were evaluated: root mean squares with degrees of freedom."""

    between: float  # of run levels
    between_dof: int
    within: float  # of single points about their run's level and their compute's mean
    within_dof: int


def _seed_layout(points: Sequence[Point]) -> _Layout:
    names = mean_names(points)
    by_place: dict[tuple[str, float], list[Point]] = {}
    for point in points:
        by_place.setdefault((names[point.run], point.compute), []).append(point)
    repeated = [group for group in by_place.values() if len(group) > 1]
    deviations: dict[str, list[float]] = {}  # by run
    for group in repeated:
        mean = np.mean([np.log(p.value) for p in group])
        for p in group:
            deviations.setdefault(p.run, []).append(float(np.log(p.value) - mean))
    levels = {run: float(np.mean(d)) for run, d in deviations.items()}
    rest = sum(float(np.sum((np.array(d) - levels[run]) ** 2)) for run, d in deviations.items())
    between_dof = len(levels) - len({names[run] for run in levels})
    within_dof = sum(len(d) for d in deviations.values()) - len(repeated) - between_dof
    return _Layout(
        float(np.sqrt(sum(x * x for x in levels.values()) / max(1, between_dof))),
        between_dof,
        float(np.sqrt(rest / max(1, within_dof))),
        within_dof,
    )
