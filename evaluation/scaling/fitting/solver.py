"""Weighted least-squares solvers for power laws, for many weightings of the same points at once.

Compute enters as t = log(C / C_min) / log(C_max / C_min), between 0 and 1, so that no number of the size of a FLOP
count appears. A weighting is a row of `weights` [R, n]; the bootstrap passes one row a round.

Power: log(y - c0) = log A - beta t, closed form. Power with constant: y = c + A exp(-beta t) is linear in (c, A) for a
given beta, so they are projected out (Golub & Pereyra 1973, variable projection) and one dimension is left: a grid
over beta finds the basin of the global minimum, a bracketing root finder of the exact derivative its bottom.

Values are one row [n] for all weightings (the bootstrap that draws runs again) or a row for each [R, n] (the one that
draws new values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BELOW_MIN = 1 - 1e-9  # of the lowest value: the constant stays below it

# Starting exponents over the whole range of compute: from nearly straight in log C to gone after 2 % of the range.
STARTS: Array = np.geomspace(0.02, 60.0, 240)
_MAX_ITERATIONS = 60  # of the root finder; it needs 6 to 12
_BETA_TOLERANCE = 4e-16  # relative: a rounding error or two
_BLOCK = 1 << 21  # weights handled at once: bounds memory


@dataclass(frozen=True)
class Solutions:
    """One fit a row: y = constant + amplitude * exp(-beta * t)."""

    beta: Array  # [R]
    constant: Array  # [R]
    amplitude: Array  # [R] at t = 0
    objective: Array  # [R] weighted sum of squares; NaN marks a row that has no solution
    at_edge: NDArray[np.bool_]  # [R] beta stopped at the end of the starting grid


def solve_power(t: Array, log_y: Array, weights: Array) -> Solutions:
    """Weighted straight lines log y = log A - beta t.

    Args:
        t: [n]. log_y: [n] or [R, n].
        weights: [R, n], zero for a point left out.
    """
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_t, mean_y = weights @ t / total, (weights * log_y).sum(axis=1) / total
        dt, dy = t - mean_t[:, None], log_y - mean_y[:, None]  # [R, n]
        variance = np.einsum("rn,rn,rn->r", weights, dt, dt)
        variance[variance <= 1e-20 * total] = np.nan  # one compute only
        beta = -np.einsum("rn,rn,rn->r", weights, dt, dy) / variance
        residual = dy + beta[:, None] * dt
    objective = np.einsum("rn,rn,rn->r", weights, residual, residual)
    no_edge = np.zeros(len(beta), dtype=bool)
    return Solutions(beta, np.zeros(len(beta)), np.exp(mean_y + beta * mean_t), objective, no_edge)


def solve_power_constant(t: Array, y: Array, weights: Array, lower: Array, upper: Array) -> Solutions:
    """Weighted least squares of y = c + A exp(-beta t) with lower <= c <= upper and A >= 0.

    Args:
        t: [n]. y: [n] or [R, n].
        weights: [R, n], zero for a point left out.
        lower, upper: bounds of c [R]; equal bounds fix it, which is how the constant is profiled.
    """
    step = max(1, _BLOCK // max(1, len(t)))
    parts = []
    for i in range(0, len(weights), step):
        rows = slice(i, i + step)
        parts.append(_solve_block(t, y if y.ndim == 1 else y[rows], weights[rows], lower[rows], upper[rows]))
    fields = ("beta", "constant", "amplitude", "objective", "at_edge")
    return Solutions(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def grid_objective(t: Array, y: Array, weights: Array, lower: Array, upper: Array) -> Array:
    """The objective at every start of beta, with (c, A) projected out: [R, len(STARTS)]."""
    e = np.exp(-np.outer(t, STARTS))  # [n, G]
    weighted_y = weights * y
    s, sy, syy = (x.sum(axis=1)[:, None] for x in (weights, weighted_y, weighted_y * y))
    se, see, sye = weights @ e, weights @ (e * e), weighted_y @ e  # [R, G]
    c, amplitude = _project(s, se, see, sy, sye, lower[:, None], upper[:, None])
    squares = syy + c * c * s + amplitude * amplitude * see
    objective: Array = squares - 2 * (c * sy + amplitude * sye - c * amplitude * se)
    return objective


def share_of_starts(objective: Array) -> float:
    """Share of the starts [G] from which descent along the grid ends in the basin of the least objective."""
    best = int(np.argmin(objective))
    falls = np.diff(objective)  # < 0: going right is downhill
    left = best
    while left > 0 and falls[left - 1] <= 0:
        left -= 1
    right = best
    while right < len(objective) - 1 and falls[right] >= 0:
        right += 1
    return (right - left + 1) / len(objective)


def _project(s: Array, se: Array, see: Array, sy: Array, sye: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """The best (c, A) for given exponentials e, from weighted sums; c clipped to its bounds, then A for that c."""
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (sye - se * sy / s) / (see - se * se / s)
        c = np.clip((sy - slope * se) / s, lower, upper)
        # Where e is constant over the points any c fits as well: take the lower bound.
        c = np.where(np.isfinite(c), c, lower)
        amplitude = np.maximum((sye - c * se) / see, 0.0)
    return c, amplitude


def _solve_block(t: Array, y: Array, weights: Array, lower: Array, upper: Array) -> Solutions:
    best = np.argmin(grid_objective(t, y, weights, lower, upper), axis=1)
    low, high = STARTS[np.maximum(best - 1, 0)], STARTS[np.minimum(best + 1, len(STARTS) - 1)]

    def slope(beta: Array) -> Array:
        # d objective / d beta = 2 A sum w r t e, where r is the residual: (c, A) being optimal, their part vanishes.
        _, amplitude, e, residual = _at(beta, t, y, weights, lower, upper)
        return np.asarray(np.einsum("rn,rn,n,rn->r", weights, residual, t, e) * amplitude)

    beta = _root(slope, low, high)
    c, amplitude, _, residual = _at(beta, t, y, weights, lower, upper)
    objective = np.einsum("rn,rn,rn->r", weights, residual, residual)
    objective[(weights > 0).sum(axis=1) < 2] = np.nan
    at_edge = (beta < STARTS[0] * 1.0001) | (beta > STARTS[-1] * 0.9999)
    return Solutions(beta, c, amplitude, objective, at_edge)


def _root(slope: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where a rising function changes sign, for many brackets [R] at once (Illinois; Dowell & Jarratt 1971).

    Where it does not change sign the end at which the minimum lies is returned.
    """
    f_low, f_high = slope(low), slope(high)
    low, high = np.where(f_high < 0, high, low), np.where(f_low > 0, low, high)
    moved = np.zeros(len(low))  # which end moved last: -1 low, 1 high
    for _ in range(_MAX_ITERATIONS):
        with np.errstate(divide="ignore", invalid="ignore"):
            middle = high - f_high * (high - low) / (f_high - f_low)
        inside = (middle > low) & (middle < high)
        middle = np.where(inside, middle, (low + high) / 2)
        f = slope(middle)
        rising = f > 0
        side = np.where(rising, 1.0, -1.0)
        again = side == moved
        f_low = np.where(rising, np.where(again, f_low / 2, f_low), f)
        f_high = np.where(rising, f, np.where(again, f_high / 2, f_high))
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
        moved = side
        if np.all((high - low <= _BETA_TOLERANCE * high) | (f == 0)):
            break
    return np.asarray(np.where(np.abs(f_low) < np.abs(f_high), low, high))


def _at(
    beta: Array, t: Array, y: Array, weights: Array, lower: Array, upper: Array
) -> tuple[Array, Array, Array, Array]:
    """c [R], A [R], e [R, n] and residuals [R, n] at given exponents, by centred sums (no cancellation)."""
    e = np.exp(-beta[:, None] * t)
    s = weights.sum(axis=1)
    weighted_y = weights * y
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_e, mean_y = np.einsum("rn,rn->r", weights, e) / s, weighted_y.sum(axis=1) / s
        de = e - mean_e[:, None]
        slope = np.einsum("rn,rn->r", de, weighted_y) / np.einsum("rn,rn,rn->r", weights, de, de)
        c = np.clip(mean_y - slope * mean_e, lower, upper)
        c = np.where(np.isfinite(c), c, lower)
        clipped = (c == lower) | (c == upper)
        rest = y - c[:, None]
        amplitude = np.einsum("rn,rn,rn->r", weights, rest, e) / np.einsum("rn,rn,rn->r", weights, e, e)
        amplitude = np.maximum(np.where(clipped, amplitude, slope), 0.0)
    return c, amplitude, e, rest - amplitude[:, None] * e
