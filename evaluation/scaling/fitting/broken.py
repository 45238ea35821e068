"""The smoothly broken power law: one exponent below a break of compute, another above it.

    y(C) = c + a C^-b0 (1 + (C / d)^(1/f))^(-(b1 - b0) f)

Caballero et al. 2022, "Broken neural scaling laws", equation 1 with one break and c1 = b1 - b0: b0 is the exponent far
below the break d, b1 the exponent far above it, f how smooth the break is, in units of log C. Neither exponent is
negative: the value does not rise with compute.

A grid gives starts, which `evaluation.scaling.fitting.broken_solver` takes down together. Objectives are sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.scaling.fitting.broken_solver import (
    Data,
    State,
    descend,
    jacobian,
    linear,
    log_fall,
    merge,
    movable,
    normal_equations,
)
from evaluation.scaling.fitting.solver import solve_power_constant

Array = NDArray[np.float64]

NAMES = ("exponent_below", "exponent_above", "break_compute", "sharpness")  # in the order of theta
# The same number of different computes as parameters would fit noise without a residue.
MIN_COMPUTES = 7
MAX_BETA = 60.0  # exponent over the whole range: gone after 2 % of it
SHARPNESS = (0.01, 1.0)  # over the whole range: a corner; a bend as wide as the range
MARGIN = 0.02  # the break lies this share of the range inside it, and has two computes on either side
# Starts: for each break and sharpness, the best pair of exponents.
_BETAS: Array = np.concatenate([[0.0], np.geomspace(0.02, 40.0, 17)])
_BREAKS: Array = np.linspace(0.0, 1.0, 13)[1:-1]
_PHIS: Array = np.array([0.02, 0.07, 0.25, 0.8])
_BINS = 1024  # computes told apart in the search and in the rounds
_MAX_BASINS = 3
_BLOCK = 1 << 20  # weights handled at once: bounds memory
_SAME = 1e-6  # objectives this close, relatively, are one optimum
_ROUNDING = 1e-24  # of the weighted squares of y: below this a residual says nothing


@dataclass(frozen=True)
class BrokenCurve:
    """y(C) of the module's equation, anchored at a reference compute."""

    exponent_below: float  # b0
    exponent_above: float  # b1
    break_compute: float  # d
    sharpness: float  # f, in units of log C; the smaller, the sharper
    constant: float  # c
    amplitude: float  # y - constant at the reference compute
    reference_compute: float

    def __call__(self, compute: ArrayLike) -> Array:
        fall = self._log_fall(compute) - self._log_fall(self.reference_compute)
        return np.asarray(self.constant + self.amplitude * np.exp(-fall))

    @property
    def log10_coefficient(self) -> float:
        """log10 of a in the module's equation."""
        return float((np.log(self.amplitude) + self._log_fall(self.reference_compute)) / np.log(10))

    def _log_fall(self, compute: ArrayLike) -> Array:
        x = np.log(np.asarray(compute, dtype=np.float64))
        bend = self.sharpness * np.logaddexp(0, (x - np.log(self.break_compute)) / self.sharpness)
        return np.asarray(self.exponent_below * x + (self.exponent_above - self.exponent_below) * bend)


@dataclass(frozen=True)
class BrokenSolution:
    """The best fit and its certificate."""

    theta: Array  # [4] exponents over the whole range, break in t, log of the sharpness in t
    constant: float
    amplitude: float  # at t = 0
    objective: float  # weighted sum of squares
    nested_objective: float  # of the power law without a break: same weights, same bounds of the constant
    rounding: float  # an objective below this is rounding only
    share_of_starts: float  # that end in the best optimum
    condition_number: float | None  # of the scaled normal equations of all parameters that are not at a bound
    stationarity: float  # largest cosine between the residual and a free parameter's derivative; 0 at an optimum
    at_bound: tuple[str, ...]  # parameters that stopped at a bound: of NAMES, or "constant"
    basins: Array  # [K, 4] the best different optima, the best first: starts for other weights

    def curve(self, log_min: float, span: float, reference: float) -> BrokenCurve:
        """The curve over compute, where t = (log C - log_min) / span, anchored at a reference compute."""
        beta0, beta1, tau, log_phi = (float(x) for x in self.theta)
        fall = log_fall(self.theta[None], np.array([[(np.log(reference) - log_min) / span]]))[0, 0]
        return BrokenCurve(
            float(beta0 / span),
            float(beta1 / span),
            float(np.exp(log_min + tau * span)),
            float(np.exp(log_phi) * span),
            self.constant,
            float(self.amplitude * np.exp(-fall)),
            float(reference),
        )

    def f_statistic(self, num_points: int) -> float:
        """What each of the break's three parameters explains, over what each degree of freedom leaves unexplained.

        The F distribution's conditions do not hold (without a break its place means nothing), yet its quantiles serve:
        on unbroken power laws of 8 to 200 points with 1 % noise, chance exceeded the 95 % quantile in 0 to 7 % of
        the fits. Of 0 where the unbroken power law leaves nothing but rounding.
        """
        dof = num_points - (5 if "constant" in self.at_bound else 6)
        gain = self.nested_objective - self.objective
        if dof < 1 or gain <= 0 or self.nested_objective <= self.rounding:
            return 0.0
        return gain / 3 / (self.objective / dof) if self.objective > 0 else float("inf")


@dataclass(frozen=True)
class BrokenRounds:
    """One fit a weighting."""

    theta: Array  # [R, 4]; all fields are NaN for a weighting with fewer than MIN_COMPUTES different computes
    constant: Array  # [R]
    amplitude: Array  # [R] at t = 0
    objective: Array  # [R]

    def values(self, t: Array) -> Array:
        """The rounds' curves at t [m]: [R, m]."""
        falls = log_fall(self.theta, t[None])
        return np.asarray(self.constant[:, None] + self.amplitude[:, None] * np.exp(-falls))


def solve_broken(t: Array, y: Array, weights: Array, *, with_constant: bool = True) -> BrokenSolution:
    """Weighted least squares of the broken power law, the best of many starts.

    Args:
        t, y, weights: [n]; y > 0, t between 0 and 1, MIN_COMPUTES different t at least.
        with_constant: fit c between 0 and min y; otherwise c = 0.
    """
    t, y, weights = (x[weights > 0] for x in (t, y, weights))
    exact, rest = merge(t, y, weights[None], with_constant=with_constant)
    coarse, _ = merge(t, y, weights[None], with_constant=with_constant, bins=_BINS)
    bounds, rounding = _bounds(exact.t[0]), float(weights @ y**2) * _ROUNDING
    plain = solve_power_constant(t, y, weights[None], np.zeros(1), exact.upper)
    unbroken = np.array([plain.beta[0], plain.beta[0], 0.5, np.log(0.1)])  # the result is never worse than this
    ends = descend(np.vstack([_starts(coarse, bounds), unbroken]), coarse, bounds)
    reached = linear(ends, coarse).objective
    basins = _distinct(ends, reached, rounding)
    theta = descend(np.vstack([basins[:1], unbroken]), exact, bounds)
    theta = theta[np.argmin(linear(theta, exact).objective)][None]
    best = linear(theta, exact)
    objective = float(best.objective[0] + rest[0])
    return BrokenSolution(
        theta[0],
        float(best.constant[0]),
        float(best.amplitude[0]),
        objective,
        float(plain.objective[0]),
        rounding,
        float(np.mean(reached <= reached.min() * (1 + _SAME) + rounding)),
        *_certificate(theta, best, exact, bounds, rounding),
        np.vstack([theta, basins[1:]]),
    )


def solve_broken_rounds(
    t: Array, y: Array, weights: Array, basins: Array, *, with_constant: bool = True
) -> BrokenRounds:
    """The same fit for many weightings, starting from the optima of the full fit.

    With more than 1024 different computes, neighbours within a thousandth of the range are merged.

    Args:
        t: [n]. y: [n], or [R, n] where every weighting has values of its own.
        weights: [R, n], zero for a point left out.
        basins: [K, 4] of `BrokenSolution`.
    """
    step = max(1, _BLOCK // max(1, len(t)))
    bounds = _bounds(np.unique(t))
    parts = [
        _solve_block(t, y if y.ndim == 1 else y[i : i + step], weights[i : i + step], basins, bounds, with_constant)
        for i in range(0, len(weights), step)
    ]
    fields = ("theta", "constant", "amplitude", "objective")
    return BrokenRounds(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _solve_block(t: Array, y: Array, weights: Array, basins: Array, bounds: Array, with_constant: bool) -> BrokenRounds:
    merged, rest = merge(t, y, weights, with_constant=with_constant, bins=_BINS)
    rows = np.flatnonzero((merged.weights > 0).sum(axis=1) >= MIN_COMPUTES)
    data = merged.rows(rows)
    ends = [descend(np.repeat(basin[None], len(rows), axis=0), data, bounds) for basin in basins]
    states = [linear(end, data) for end in ends]
    best = np.argmin([s.objective for s in states], axis=0)

    def pick(choices: list[Array]) -> Array:
        chosen = np.full((len(weights), *choices[0].shape[1:]), np.nan)
        chosen[rows] = np.stack(choices)[best, np.arange(len(rows))]
        return chosen

    return BrokenRounds(
        pick(ends),
        pick([s.constant for s in states]),
        pick([s.amplitude for s in states]),
        pick([s.objective for s in states]) + rest,
    )


def _bounds(t: Array) -> Array:
    """Least and largest theta: [2, 4]. The break has two of the different computes t on either side."""
    first, last = max(float(t[1]), MARGIN), min(float(t[-2]), 1 - MARGIN)
    low, high = np.log(SHARPNESS)
    return np.array([[0.0, 0.0, min(first, last), low], [MAX_BETA, MAX_BETA, max(first, last), high]])


def _starts(data: Data, bounds: Array) -> Array:
    """The best pair of exponents for each break and sharpness of the grid: [S, 4]."""
    beta0, beta1 = (x.ravel() for x in np.meshgrid(_BETAS, _BETAS, indexing="ij"))
    starts = []
    for tau in bounds[0, 2] + (bounds[1, 2] - bounds[0, 2]) * _BREAKS:
        for phi in _PHIS:
            grid = np.stack([beta0, beta1, np.full_like(beta0, tau), np.full_like(beta0, np.log(phi))], axis=1)
            starts.append(grid[np.nanargmin(linear(grid, data).objective)])
    return np.array(starts)


def _distinct(ends: Array, objective: Array, rounding: float) -> Array:
    """The best of the optima, one of each objective: [K, 4]."""
    order = np.argsort(objective)
    apart = np.diff(objective[order]) > _SAME * objective[order][:-1] + rounding
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    return np.asarray(ends[order[first[:_MAX_BASINS]]])


def _certificate(
    theta: Array, best: State, data: Data, bounds: Array, rounding: float
) -> tuple[float | None, float, tuple[str, ...]]:
    """Condition number, stationarity, parameters at a bound."""
    normal, downhill = normal_equations(theta, best, data)
    free = movable(theta, downhill, bounds)[0]
    lengths = np.sqrt(np.diag(normal[0]) * max(float(best.objective[0]), rounding))
    cosines = np.abs(downhill[0]) / np.maximum(lengths, np.finfo(float).tiny)
    inside = (theta[0] > bounds[0]) & (theta[0] < bounds[1])
    at_bound = [name for name, ok in zip(NAMES, inside, strict=True) if not ok]
    if best.clipped[0]:
        at_bound.append("constant")
    parts = [jacobian(theta, best, data)[0][:, inside], best.decay[0][:, None]]
    if not best.clipped[0]:
        parts.append(np.ones_like(parts[1]))
    return (
        _condition(np.hstack(parts) * np.sqrt(data.weights[0])[:, None]),
        float(cosines[free].max(initial=0.0)),
        tuple(at_bound),
    )


def _condition(columns: Array) -> float | None:
    """Condition number of the normal equations with unit diagonal; None where they are singular."""
    lengths = np.linalg.norm(columns, axis=0)
    if not np.all(lengths > 0):
        return None
    condition = float(np.linalg.cond(columns / lengths)) ** 2
    return condition if np.isfinite(condition) else None
