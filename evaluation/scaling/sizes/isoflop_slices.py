"""Slices of equal training compute: which points, or points interpolated on learning curves, belong to which budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.points import Array, Point, columns
from evaluation.scaling.sizes.distinct import distinct, num_distinct

SAME_COMPUTE = float(np.log(1.05))  # a point this near to a budget is at the budget
GROUP_WIDTH = float(np.log(1.25))  # points that were meant to be of equal compute scatter by no more than this
GROUPED_SHARE = 0.8  # of the points, for a design of equal computes
MIN_SIZES = 3  # of a parabola
ENOUGH_SIZES = 4  # for an interval
_GRID = 400


@dataclass(frozen=True)
class Samples:
    """The values of one slice, one a run."""

    budget: float  # FLOPs
    log_n: Array  # [n]
    log_d: Array  # [n]
    value: Array  # [n]
    stderr: Array | None  # [n]
    run: NDArray[np.int64]  # [n]
    interpolated: bool

    def subset(self, chosen: NDArray[np.bool_]) -> Samples:
        stderr = None if self.stderr is None else self.stderr[chosen]
        return replace(
            self,
            log_n=self.log_n[chosen],
            log_d=self.log_d[chosen],
            value=self.value[chosen],
            stderr=stderr,
            run=self.run[chosen],
        )

    @property
    def num_sizes(self) -> int:
        return num_distinct(self.log_n)


@dataclass(frozen=True)
class _Table:
    """Usable points as arrays, by run and compute."""

    log_c: Array
    log_n: Array
    log_d: Array
    value: Array
    stderr: Array | None
    run: NDArray[np.int64]
    num_runs: int

    def rows(self, chosen: NDArray[np.int64]) -> tuple[Array, Array, Array, Array | None, NDArray[np.int64]]:
        stderr = None if self.stderr is None else self.stderr[chosen]
        return self.log_n[chosen], self.log_d[chosen], self.value[chosen], stderr, self.run[chosen]


def find_slices(points: Sequence[Point], budgets: Sequence[float] | None, num_budgets: int) -> list[Samples]:
    """The slices at these budgets; None: at the computes that the points share, else where most sizes overlap.

    Args:
        points: finite and positive in compute, size, images and value.
        num_budgets: how many, log-spaced, where the points share no computes.
    """
    table = _table(points)
    groups = equal_computes(table.log_c, table.log_n)
    if budgets is None and sum(len(group) for group in groups) >= GROUPED_SHARE * len(table.log_c):
        return [Samples(_mean_compute(table.log_c[g]), *table.rows(g), interpolated=False) for g in groups]
    logs = np.log(budgets) if budgets is not None else _overlap(table, num_budgets)
    return [_at_budget(table, float(budget)) for budget in logs]


def equal_computes(log_c: Array, log_n: Array) -> list[NDArray[np.int64]]:
    """Groups of points of nearly equal compute with enough sizes for a parabola, apart from each other."""
    order = np.argsort(log_c, kind="stable")
    gaps = np.diff(log_c[order])
    groups = np.split(order, np.flatnonzero(gaps > SAME_COMPUTE) + 1)
    return [g for g in groups if np.ptp(log_c[g]) <= GROUP_WIDTH and num_distinct(log_n[g]) >= MIN_SIZES]


def _table(points: Sequence[Point]) -> _Table:
    c = columns(points)
    log_n, log_d = np.log([p.num_params for p in points]), np.log([p.images for p in points])
    run = curve_labels(points)
    order = np.lexsort((np.log(c.compute), run))
    stderr = None if c.stderr is None else c.stderr[order]
    return _Table(
        np.log(c.compute)[order], log_n[order], log_d[order], c.value[order], stderr, run[order], int(run.max()) + 1
    )


def curve_labels(points: Sequence[Point]) -> NDArray[np.int64]:
    """Which points lie on one curve of a size: [n].

    Those of one run and size; or, where no run has two points (each was trained to its own end), those of one size.
    """
    size = distinct(np.log([p.num_params for p in points]))
    names: dict[tuple[str, int], int] = {}
    label = np.array([names.setdefault((p.run, s), len(names)) for p, s in zip(points, size.tolist(), strict=True)])
    return label if len(names) < len(points) else size


def _at_budget(table: _Table, budget: float) -> Samples:
    """Each run at the budget: its point there, or what its curve, straight in log-log, says; never beyond its range."""
    rows = []
    any_interpolated = False
    for run in range(table.num_runs):
        mine = np.flatnonzero(table.run == run)
        log_c = table.log_c[mine]
        nearest = int(np.argmin(np.abs(log_c - budget)))
        if log_c[0] <= budget <= log_c[-1] and len(mine) > 1:
            i = min(max(int(np.searchsorted(log_c, budget)), 1), len(mine) - 1)
            left, right = mine[i - 1], mine[i]
            width = table.log_c[right] - table.log_c[left]
            share = (budget - table.log_c[left]) / width if width > 0 else 0.0
            rows.append(_between(table, left, right, share))
            any_interpolated = True
        elif abs(log_c[nearest] - budget) <= SAME_COMPUTE:
            rows.append(_between(table, mine[nearest], mine[nearest], 0.0))
    found = np.array(rows).reshape(-1, 5)
    stderr = found[:, 3] if table.stderr is not None else None
    run_of = found[:, 4].astype(np.int64)
    return Samples(float(np.exp(budget)), found[:, 0], found[:, 1], found[:, 2], stderr, run_of, any_interpolated)


def _between(table: _Table, left: int, right: int, share: float) -> tuple[float, float, float, float, float]:
    """(log N, log D, value, its standard error, run) at this share of the way between two points of a run."""
    log_d = (1 - share) * table.log_d[left] + share * table.log_d[right]
    value = np.exp((1 - share) * np.log(table.value[left]) + share * np.log(table.value[right]))
    errors = (np.nan, np.nan) if table.stderr is None else (table.stderr[left], table.stderr[right])
    stderr = errors[0] if left == right else np.hypot((1 - share) * errors[0], share * errors[1])
    return float(table.log_n[left]), float(log_d), float(value), float(stderr), float(table.run[left])


def _overlap(table: _Table, num_budgets: int) -> Array:
    """Log budgets, evenly spaced over the range of compute in which enough sizes have learning curves."""
    runs = [np.flatnonzero(table.run == run) for run in range(table.num_runs)]
    ranges = [(table.log_n[r[0]], table.log_c[r[0]], table.log_c[r[-1]]) for r in runs if len(r) > 1]
    if not ranges:
        return np.empty(0)
    grid = np.linspace(min(r[1] for r in ranges), max(r[2] for r in ranges), _GRID)
    size = distinct(np.array([log_n for log_n, _, _ in ranges]))
    low, high = (np.array([r[k] for r in ranges]) for k in (1, 2))
    sizes = np.array([len(set(size[(low <= budget) & (budget <= high)])) for budget in grid])
    for least in (ENOUGH_SIZES, MIN_SIZES):
        inside = np.flatnonzero(sizes >= least)
        if len(inside):
            longest = max(np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1), key=len)
            return np.linspace(grid[longest[0]], grid[longest[-1]], num_budgets)
    return np.empty(0)


def _mean_compute(log_c: Array) -> float:
    return float(np.exp(log_c.mean()))
