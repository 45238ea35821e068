"""The profile likelihood of the constant: which irreducible values fit about as well as the best one."""

from __future__ import annotations

import numpy as np

from evaluation.scaling.fitting.solver import solve_power_constant
from evaluation.scaling.points import Array, Interval


def profile_interval(t: Array, y: Array, weights: Array, *, best: float, upper: float, threshold: float) -> Interval:
    """All c in [0, upper] whose objective, minimised over the other parameters, is within the threshold.

    Points are taken as independent.
    """

    def profile(constants: Array) -> Array:
        rows = np.broadcast_to(weights, (len(constants), len(weights)))
        return solve_power_constant(t, y, rows, constants, constants).objective

    outer = np.array([0.0, upper])
    within = profile(outer) <= threshold
    inner = np.full(2, best)
    for _ in range(10):  # both ends at once; `inner` is within the threshold, `outer` is not; 8 times closer a round
        rungs = np.linspace(inner, outer, 9, axis=1)  # [2, 9]
        inside = profile(rungs[:, 1:-1].ravel()).reshape(2, -1) <= threshold
        last = np.argmin(np.hstack([inside, np.zeros((2, 1), dtype=bool)]), axis=1)  # how many rungs are inside
        inner, outer = rungs[[0, 1], last], rungs[[0, 1], last + 1]
    low, high = np.where(within, [0.0, upper], inner)
    return float(low), float(high)
