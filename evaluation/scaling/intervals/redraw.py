"""A study drawn again: new runs at the same places, with levels and scatter drawn from the fitted spread.

Every round draws the spread too, from what its degrees of freedom leave open, so that few seeds give wide intervals.
"""

from __future__ import annotations

import numpy as np

from evaluation.scaling.intervals.spread import Spread, run_scales
from evaluation.scaling.points import Array, Columns


def redraw(c: Columns, spread: Spread, *, num_rounds: int, seed: int, scale: Array | None = None) -> Array:
    """How far the log value of every point lies from what is expected of it, in every round: [R, n].

    Args:
        c: points of the runs themselves, not averaged over seeds.
        scale: relative size of each point's scatter [n]; default: all alike.
    """
    rng = np.random.default_rng(seed)
    scale = np.ones(len(c.value)) if scale is None else scale
    level_scale = spread.between * _drawn_scale(rng, spread.between_dof, num_rounds)
    point_scale = spread.within * _drawn_scale(rng, spread.within_dof, num_rounds)
    level = rng.standard_normal((num_rounds, len(c.runs))) * run_scales(c, scale)
    point = rng.standard_normal((num_rounds, len(c.value)))
    for run in range(len(c.runs)):  # the level of a run includes the mean of its scatter
        own = c.run == run
        point[:, own] -= point[:, own].mean(axis=1, keepdims=True)
    return np.asarray(level[:, c.run] * level_scale[:, None] + point * scale * point_scale[:, None])


def _drawn_scale(rng: np.random.Generator, dof: float, num_rounds: int) -> Array:
    """sigma / s [R], where s² has `dof` degrees of freedom: the spread that may be behind the one that was seen."""
    if not np.isfinite(dof) or dof <= 0:
        return np.ones(num_rounds)
    return np.asarray(np.sqrt(dof / rng.chisquare(dof, num_rounds)))
