"""A study drawn again: new runs at the same places, with levels and scatter drawn from the fitted spread.

Every round draws the spread too, from what its degrees of freedom leave open, so that few seeds give wide intervals.
The frontier is then selected from what was drawn: the luck of who is ahead where enters every interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.scaling.intervals.spread import Spread
from evaluation.scaling.points import Array, Columns, Point
from evaluation.scaling.seeds import mean_names


def redraw(
    c: Columns, mean: Array, spread: Spread, *, num_seeds: Array | None = None, num_rounds: int, seed: int
) -> Array:
    """Log values of every point in every round: [R, n].

    Args:
        c: the points; a run of `c` may be the mean of several seeds.
        mean: expected log values [n].
        num_seeds: how many runs each run of `c` is the mean of [runs]; default 1.
    """
    rng = np.random.default_rng(seed)
    num_runs = len(c.runs)
    share = 1 / np.sqrt(np.ones(num_runs) if num_seeds is None else num_seeds)  # a mean scatters less
    level_scale = spread.between * _drawn_scale(rng, spread.between_dof, num_rounds)
    point_scale = spread.within * _drawn_scale(rng, spread.within_dof, num_rounds)
    level = rng.standard_normal((num_rounds, num_runs)) * level_scale[:, None] * share
    point = rng.standard_normal((num_rounds, len(mean)))
    counts = np.bincount(c.run, minlength=num_runs)
    for run in range(num_runs):  # the level of a run includes the mean of its scatter
        own = c.run == run
        point[:, own] -= point[:, own].mean(axis=1, keepdims=True)
    # Points of a run of n scatter about its level with (n - 1) / n of the variance: that is what is left here.
    point[:, counts[c.run] == 1] = 0.0
    return np.asarray(mean + level[:, c.run] + point * point_scale[:, None] * share[c.run])


def seeds_of_means(candidates: Columns, admitted: Sequence[Point]) -> Array:
    """How many runs each run of the candidates is the mean of: [runs]."""
    names = mean_names(admitted)
    members: dict[str, set[str]] = {}
    for point in admitted:
        members.setdefault(names[point.run], set()).add(point.run)
    return np.array([len(members.get(run, {run})) for run in candidates.runs], dtype=np.float64)


def _drawn_scale(rng: np.random.Generator, dof: float, num_rounds: int) -> Array:
    """sigma / s [R], where s² has `dof` degrees of freedom: the spread that may be behind the one that was seen."""
    if not np.isfinite(dof) or dof <= 0:
        return np.ones(num_rounds)
    return np.asarray(np.sqrt(dof / rng.chisquare(dof, num_rounds)))
