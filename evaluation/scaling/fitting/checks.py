"""Is a law the right thing to fit? Points that do not belong to the others, and values that rise again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evaluation.scaling.points import Array

# Chance that sound points with normal scatter are called outliers.
OUTLIER_LEVEL = 1e-3
MAX_OUTLIERS = 10
# Mean square by which a rise must stand out, in units of the scatter of neighbours. Simulated laws of 6 to 60 points
# with 2 % noise, plateaus among them, stayed below 2 in 99.5 of 100 cases; rising by a tenth over the last third, with
# 0.3 % noise, gave 12 or more in 90 of 100.
_RISE = 3.0
_ROUNDING = 1e-20  # of the squares of the values: below this nothing is scatter

# Refits without some points: which take part [n] -> residuals of all [n] and their model's derivatives [n, p].
Refit = Callable[[NDArray[np.bool_]], tuple[Array, Array]]


def outliers(refit: Refit, weights: Array, scale: Array) -> list[int]:
    """Points that lie too far from the law of the others, by a generalised extreme studentised deviate test.

    Rosner 1983: the most deviant point is taken out and the law refitted, several times, so that outliers do not hide
    one another. Deviates are residuals over what the *other* points' scatter says of them (externally studentised).

    Args:
        weights: [n].
        scale: size of the values [n], in the unit of the residuals; tells scatter from rounding.
    """
    n = len(weights)
    active = np.ones(n, dtype=bool)
    removed: list[int] = []
    found = 0
    for _ in range(min(MAX_OUTLIERS, n // 4)):
        residual, jacobian = refit(active)
        dof = int(active.sum()) - jacobian.shape[1] - 1
        if dof < 2:
            break
        deviate = _studentised(residual[active], jacobian[active], weights[active], scale[active], dof)
        worst = int(np.argmax(deviate))
        removed.append(int(np.flatnonzero(active)[worst]))
        if deviate[worst] > special.stdtrit(dof, 1 - OUTLIER_LEVEL / (2 * active.sum())):
            found = len(removed)
        active[removed[-1]] = False
    return removed[:found]


def rise(log_compute: Array, log_value: Array, weights: Array) -> float | None:
    """How far (in log value) values rise with compute against all sound decreasing curves; None where they do not.

    The nearest non-increasing sequence (pool adjacent violators) is missed by more than points scatter about the
    straight line between their neighbours. The median of that scatter counts, which a bend or a valley leaves alone.
    """
    order = np.lexsort((log_value, log_compute))
    x, y, w = log_compute[order], log_value[order], weights[order]
    starts = np.flatnonzero(np.diff(x, prepend=-np.inf) > 0)
    w_at = np.add.reduceat(w, starts)
    y = np.add.reduceat(w * y, starts) / w_at
    if len(y) < 6:
        return None
    left = y - _non_increasing(y, w_at)
    if float(w_at @ left**2) / len(y) <= _RISE * _neighbour_scatter(x[starts], y, w_at) + _ROUNDING * w_at.mean():
        return None
    return float(np.ptp(left))


def _neighbour_scatter(x: Array, y: Array, weights: Array) -> float:
    """Variance of y about smooth values at weight 1, from how far points lie off the line between their neighbours."""
    share = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])  # of the left neighbour
    off = y[1:-1] - share * y[:-2] - (1 - share) * y[2:]
    off /= np.sqrt(1 / weights[1:-1] + share**2 / weights[:-2] + (1 - share) ** 2 / weights[2:])
    return float((np.median(np.abs(off)) / special.ndtri(0.75)) ** 2)


def _studentised(residual: Array, jacobian: Array, weights: Array, scale: Array, dof: int) -> Array:
    root = np.sqrt(weights)
    e, q = residual * root, np.linalg.qr(jacobian * root[:, None])[0]
    left = np.maximum(1 - np.einsum("np,np->n", q, q), 1e-12)  # 1 - leverage
    squares = float(e @ e)
    others = np.maximum(squares - e**2 / left, 0.0) / dof
    floor = _ROUNDING * (scale * root) ** 2
    return np.asarray(np.abs(e) / np.sqrt(left * np.maximum(others, floor))) * (e**2 > floor)


def _non_increasing(y: Array, weights: Array) -> Array:
    """Weighted least-squares non-increasing sequence [n]."""
    level: list[float] = []
    mass: list[float] = []
    count: list[int] = []
    for value, weight in zip(y.tolist(), weights.tolist(), strict=True):
        level.append(value)
        mass.append(weight)
        count.append(1)
        while len(level) > 1 and level[-2] < level[-1]:
            total = mass[-2] + mass[-1]
            level[-2:] = [(level[-2] * mass[-2] + level[-1] * mass[-1]) / total]
            mass[-2:] = [total]
            count[-2:] = [count[-2] + count[-1]]
    return np.repeat(level, count)
