"""The compute frontier (lower envelope of value against compute), and the slope of each size's own curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.points import Array, Columns, Point, columns
from evaluation.scaling.seeds import average_seeds

MIN_IMAGES = 1000  # points before this are a network still at its initialisation, never fitted


@dataclass(frozen=True)
class Exclusion:
    """A point that is not on the frontier, and why."""

    point: Point
    reason: str


@dataclass(frozen=True)
class Frontier:
    """The points that no curve beats at their compute. A curve is a run, or the mean of runs that differ in seed."""

    points: tuple[Point, ...]  # by compute
    candidates: tuple[Point, ...]  # all points of the curves, by compute
    admitted: tuple[
        Point, ...
    ]  # of the runs themselves, by compute; the candidates are these where seeds do not repeat
    exclusions: tuple[Exclusion, ...]  # candidates that are not on the frontier, and points that were not admitted
    sizes: tuple[int, ...]  # parameter counts that reach it, ascending

    @property
    def decades(self) -> float:
        """Decades of compute that it spans."""
        if len(self.points) < 2:
            return 0.0
        return float(np.log10(self.points[-1].compute / self.points[0].compute))


def admit(points: Sequence[Point], *, min_images: int = MIN_IMAGES) -> tuple[list[Point], list[Exclusion]]:
    """Points that may be fitted, by compute, and those that may not (an unknown number of images is admitted)."""
    admitted, excluded = [], []
    for point in sorted(points, key=lambda p: (p.compute, p.run)):
        if not (np.isfinite(point.value) and point.value > 0):
            excluded.append(Exclusion(point, f"its value {point.value} is not finite and positive"))
        elif not (np.isfinite(point.compute) and point.compute > 0):
            excluded.append(Exclusion(point, f"its compute {point.compute} is not finite and positive"))
        elif 0 < point.images < min_images:
            excluded.append(Exclusion(point, f"after {point.images} images, before the first {min_images}"))
        else:
            admitted.append(point)
    return admitted, excluded


def find_frontier(points: Sequence[Point], *, min_images: int = MIN_IMAGES) -> Frontier:
    """Candidates, the frontier among them, and the reason for every point that is not on it."""
    admitted, exclusions = admit(points, min_images=min_images)
    candidates = average_seeds(admitted)
    beaten = domination(columns(candidates))
    runs = columns(candidates).runs
    on_frontier = []
    for row, point in zip(beaten, candidates, strict=True):
        if row.any():
            name = runs[int(np.argmax(row))]
            how = "an earlier point of its own run is as good" if name == point.run else f"run {name} does better there"
            exclusions.append(Exclusion(point, how))
        else:
            on_frontier.append(point)
    sizes = tuple(sorted({p.num_params for p in on_frontier}))
    return Frontier(tuple(on_frontier), tuple(candidates), tuple(admitted), tuple(exclusions), sizes)


def all_points(points: Sequence[Point]) -> Frontier:
    """Every point in the place of the frontier, by compute: for points that are to be fitted as they are."""
    kept = tuple(sorted(points, key=lambda p: (p.compute, p.run)))
    return Frontier(kept, kept, kept, (), tuple(sorted({p.num_params for p in kept})))


def domination(c: Columns) -> NDArray[np.bool_]:
    """Whether a curve beats a point at the point's compute: [n, curves]; a curve is a run of `c`."""
    log_x, log_y = np.log(c.compute), np.log(c.value)
    beaten = [_beats(own, log_x, log_y[None])[0] for own in _curves(c)]
    return np.asarray(np.array(beaten, dtype=bool).reshape(len(c.runs), len(log_x)).T)


def frontier_mask(c: Columns, log_y: Array) -> NDArray[np.bool_]:
    """Which points are on the frontier, for many sets of values of the same points: [R, n] of log values [R, n]."""
    beaten = np.zeros(log_y.shape, dtype=bool)
    for own in _curves(c):
        beaten |= _beats(own, np.log(c.compute), log_y)
    return ~beaten


def _curves(c: Columns) -> list[NDArray[np.int64]]:
    """The points of each run, by compute."""
    order = np.lexsort((np.log(c.value), c.compute, c.run))
    return np.split(order, np.flatnonzero(np.diff(c.run[order])) + 1) if len(order) else []


def _beats(own: NDArray[np.int64], log_x: Array, log_y: Array) -> NDArray[np.bool_]:
    """Whether the curve of the points `own` beats each point at its compute: [R, n] of log values [R, n].

    It does if it has as good a value at less compute (or a better one at the same), or if the straight line in log-log
    between its neighbouring points passes below. Learning curves are convex there, so the line is above the run's true
    curve: where checkpoints are sparse, a point is not on the frontier only because others were not evaluated near it.
    """
    x, y = log_x[own], log_y[:, own]
    before, upto = (np.searchsorted(x, log_x, side=side) for side in ("left", "right"))
    # lowest[:, k]: the least of the first k points
    lowest = np.minimum.accumulate(np.concatenate([np.full((len(y), 1), np.inf), y], axis=1), axis=1)
    beaten = (lowest[:, before] <= log_y) | (lowest[:, upto] < log_y)
    between = np.flatnonzero((before > 0) & (upto < len(x)))  # strictly inside, or at one of its computes
    foreign = between[~np.isin(between, own)]
    if len(foreign):
        right = upto[foreign]
        share = (log_x[foreign] - x[right - 1]) / (x[right] - x[right - 1])
        line = y[:, right - 1] * (1 - share) + y[:, right] * share
        beaten[:, foreign] |= line < log_y[:, foreign] - 1e-12
    return beaten


@dataclass(frozen=True)
class Slope:
    """d log value / d log compute along the runs of one group (a run, or all runs of a size)."""

    name: str
    num_params: int
    num_runs: int
    num_points: int
    slope: float | None  # None for fewer than two different computes
    stderr: float | None  # of the scatter about the line; None without a degree of freedom
    min_compute: float
    max_compute: float


def slopes_by_run(points: Sequence[Point]) -> tuple[Slope, ...]:
    """The log-log slope of every run's own curve, by size and compute."""
    return _slopes(points, lambda p: p.run)


def slopes_by_size(points: Sequence[Point]) -> tuple[Slope, ...]:
    """The common log-log slope of every size's runs, each run with an intercept of its own."""
    return _slopes(points, lambda p: str(p.num_params))


def _slopes(points: Sequence[Point], key: Callable[[Point], str]) -> tuple[Slope, ...]:
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.num_params, p.run, p.compute)):
        groups.setdefault(key(point), []).append(point)
    return tuple(_slope(name, group) for name, group in groups.items())


def _slope(name: str, group: list[Point]) -> Slope:
    c = columns(group)
    x, y = _within_runs(np.log(c.compute), c), _within_runs(np.log(c.value), c)
    dof = len(group) - len(c.runs) - 1
    variance = float(x @ x)
    slope = float(x @ y) / variance if variance > 1e-20 else None
    stderr = None
    if slope is not None and dof > 0:
        residual = y - slope * x
        stderr = float(np.sqrt(residual @ residual / dof / variance))
    return Slope(
        name, group[0].num_params, len(c.runs), len(group), slope, stderr,
        float(c.compute.min()), float(c.compute.max()),
    )  # fmt: skip


def _within_runs(values: Array, c: Columns) -> Array:
    """Values less the mean of their run."""
    means = np.bincount(c.run, weights=values) / np.bincount(c.run)
    return np.asarray(values - means[c.run])
