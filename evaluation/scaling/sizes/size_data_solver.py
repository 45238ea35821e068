"""Minimises Huber's loss of the log residuals of E + A N^-alpha + B D^-beta, for many weightings at once.

Size and data enter as u = log(N / N_min) / log(N_max / N_min) and v alike, so the law is E + A e^(-p u) + B e^(-q v)
with all five numbers near 1; E, A, B are in units of the geometric mean value. In N and D themselves the Hessian's
condition number is about 1e11 on published tables and quasi-Newton methods stop far from the optimum.

The method is Newton's, projected onto the bounds (Bertsekas 1982). Huber's loss has no curvature outside delta, and
log L is not convex, so the Hessian H may have small or negative eigenvalues. They are taken relative to the matrix M
of iteratively reweighted least squares, which majorises H for a model that is linear, and replaced by their size, or
by a floor: where H has curvature the step is Newton's, where it has none it is that of reweighted least squares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from evaluation.scaling.sizes.robust import Loss, huber, huber_pull, huber_weight

Array = NDArray[np.float64]

# Exponents over the whole range of sizes (or data): from nearly straight in its logarithm to gone after 2 % of it.
MIN_RATE, MAX_RATE = 0.02, 60.0
E, A, B, P, Q = range(5)
START_RATES = np.geomspace(0.05, 40.0, 8)  # starting exponents, over the whole range of sizes and of data
_LAD_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
_FIRST_FLOOR, _LEAST_FLOOR, _LAST_FLOOR = 1e-2, 1e-9, 1e12
_MAX_STEPS = 300
_MARGIN = 1e-9  # a term this small is taken for zero: descents do not creep along a bound
_RIDGE = 1e-13
_BLOCK = 1 << 15  # residuals handled at once: they stay in the cache


@dataclass(frozen=True)
class Problem:
    """The points in the solver's units, and the bounds of (E, A, B, p, q)."""

    u: Array  # [n] log size, between 0 and 1
    v: Array  # [n] log data, between 0 and 1
    log_y: Array  # [n] log value over the geometric mean; or [R, n], where every row has values of its own
    upper: Array  # [5]; 0 leaves a term out

    @property
    def lower(self) -> Array:
        return np.array([0.0, 0.0, 0.0, MIN_RATE, MIN_RATE])

    def rows(self, chosen: slice | NDArray[np.int64]) -> Problem:
        """The problem of some of the rows."""
        return self if self.log_y.ndim == 1 else replace(self, log_y=self.log_y[chosen])


@dataclass(frozen=True)
class Minima:
    """Where the descents ended, one a row."""

    theta: Array  # [R, 5]
    objective: Array  # [R] sum of weighted Huber losses
    imbalance: Array  # [R] largest |sum| over sum of |terms| of the gradient's components: 0 where stationary


def problem_of(u: Array, v: Array, log_y: Array, *, without: int | None = None) -> Problem:
    """A problem, with all terms or without one of E, A, B."""
    upper = np.array([np.inf, np.inf, np.inf, MAX_RATE, MAX_RATE])
    if without is not None:
        upper[without] = 0.0
    return Problem(u, v, log_y, upper)


def residuals(problem: Problem, theta: Array) -> Array:
    """log prediction - log value, [R, n], at parameters [R, 5]."""
    x, y = np.exp(-theta[:, P, None] * problem.u), np.exp(-theta[:, Q, None] * problem.v)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(theta[:, E, None] + theta[:, A, None] * x + theta[:, B, None] * y) - problem.log_y)


def starts(problem: Problem, weights: Array, rates: Array) -> Array:
    """Every pair of these exponents with its best (E, A, B) >= 0 by relative least squares: [len(rates)^2, 5]."""
    root, inverse = np.sqrt(weights), np.exp(-problem.log_y)
    x, y = np.exp(-np.outer(rates, problem.u)), np.exp(-np.outer(rates, problem.v))
    used = problem.upper[:3] > 0
    found = []
    for i, p in enumerate(rates):
        for j, q in enumerate(rates):
            design = np.stack([np.ones_like(problem.u), x[i], y[j]], axis=1)[:, used]
            linear = np.zeros(3)
            linear[used] = nnls(design * (root * inverse)[:, None], root)[0]
            found.append([*linear, p, q])
    return np.array(found)


def minimise(problem: Problem, weights: Array, start: Array, delta: float, tolerance: float = 1e-14) -> Minima:
    """Descend from each start.

    Args:
        weights: [R, n], or [n] for the same in every row; zero for a point left out.
        start: [R, 5].
        tolerance: a descent ends where another step would gain less than this share of the objective.
    """
    rows = max(1, _BLOCK // max(1, len(problem.u)))
    weights = np.broadcast_to(weights, (len(start), len(problem.u)))
    parts = [
        _descend(problem.rows(block), weights[block], start[block].copy(), delta, tolerance)
        for block in (slice(i, i + rows) for i in range(0, len(start), rows))
    ]
    return Minima(*(np.concatenate([getattr(part, name) for part in parts]) for name in Minima.__annotations__))


def solve(problem: Problem, weights: Array, start: Array, loss: Loss, delta: float) -> Minima:
    """The minima of one of the losses from many starts. Those of lad are reached by Huber's with delta towards 0."""
    if loss == "lsq":
        return minimise(problem, weights, start, np.inf)
    if loss == "huber":
        # Straight to the loss, and by way of least squares: the two see different basins.
        loose = minimise(problem, weights, start, np.inf, 1e-4)
        return minimise(problem, weights, np.concatenate([start, loose.theta]), delta)
    minima = minimise(problem, weights, start, _LAD_DELTAS[0], 1e-6)
    for smaller in _LAD_DELTAS[1:]:
        minima = minimise(problem, weights, minima.theta, smaller)
    return minima


def solve_near(loss: Loss, delta: float, problem: Problem, weights: Array, start: Array) -> Array:
    """The parameters [R, 5] of a bootstrap's rounds, each from its start, to far less than their scatter."""
    deltas = {"huber": (delta,), "lsq": (np.inf,), "lad": _LAD_DELTAS[1:4]}[loss]
    for smaller in deltas:
        start = minimise(problem, weights, start, smaller, 1e-9).theta
    return start


def least_delta(loss: Loss, delta: float) -> float:
    """The delta of the Huber loss that stands for a loss in the end."""
    return {"huber": delta, "lsq": np.inf, "lad": _LAD_DELTAS[-1]}[loss]


@dataclass
class _Expansion:
    """The objective to second order around each row's parameters."""

    objective: Array  # [R]
    gradient: Array  # [R, 5]
    hessian: Array  # [R, 5, 5]
    majoriser: Array  # [R, 5, 5] of reweighted least squares
    pulls: Array  # [R, 5] the gradient with all terms taken positive

    def replace(self, rows: NDArray[np.int64], other: _Expansion, chosen: NDArray[np.bool_]) -> None:
        for name in _Expansion.__annotations__:
            getattr(self, name)[rows[chosen]] = getattr(other, name)[chosen]


def _descend(problem: Problem, weights: Array, theta: Array, delta: float, tolerance: float) -> Minima:
    at = expand(problem, weights, theta, delta)
    floor = np.full(len(theta), _FIRST_FLOOR)
    rows = np.arange(len(theta))
    for _ in range(_MAX_STEPS):
        part = _Expansion(*(getattr(at, name)[rows] for name in _Expansion.__annotations__))
        step, gain = _step(problem, theta[rows], part, floor[rows])
        trial = theta[rows] + step
        trial[trial < problem.lower + _MARGIN] = 0.0
        trial = np.clip(trial, problem.lower, problem.upper)
        new = expand(problem.rows(rows), weights[rows], trial, delta)
        better = new.objective < part.objective
        theta[rows[better]] = trial[better]
        at.replace(rows, new, better)
        floor[rows] = np.where(better, np.maximum(floor[rows] / 8, _LEAST_FLOOR), floor[rows] * 16)
        rows = rows[(gain > tolerance * part.objective) & (floor[rows] < _LAST_FLOOR)]
        if len(rows) == 0:
            break
    free = _free(problem, theta, at.gradient)
    with np.errstate(invalid="ignore"):
        imbalance = np.nanmax(np.where(free, np.abs(at.gradient) / at.pulls, 0.0), axis=1, initial=0.0)
    return Minima(theta, at.objective, imbalance)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # trials far outside: their objective is infinite
def expand(problem: Problem, weights: Array, theta: Array, delta: float) -> _Expansion:
    """Objective, gradient, Hessian and majoriser at parameters [R, 5] for weights [R, n]."""
    u, v = problem.u, problem.v
    jacobian = jacobian_of(problem, theta)
    residual = -np.log(jacobian[:, E]) - problem.log_y
    pull = weights * huber_pull(residual, delta)
    majoriser = (jacobian * (weights * huber_weight(residual, delta))[:, None]) @ jacobian.swapaxes(1, 2)
    hessian = (jacobian * (weights * (np.abs(residual) <= delta) - pull)[:, None]) @ jacobian.swapaxes(1, 2)
    for k, (linear, rate, t) in enumerate(((A, P, u), (B, Q, v))):
        pulled = pull * jacobian[:, (A, B)[k]]
        first, second = pulled @ t, pulled @ (t * t)
        hessian[:, linear, rate] -= first
        hessian[:, rate, linear] -= first
        hessian[:, rate, rate] += theta[:, linear] * second
    gradient = np.einsum("rkn,rn->rk", jacobian, pull)
    pulls = np.einsum("rkn,rn->rk", np.abs(jacobian), np.abs(pull))
    value = np.where(np.isfinite(residual).all(axis=1), (weights * huber(residual, delta)).sum(axis=1), np.inf)
    return _Expansion(value, gradient, hessian, majoriser, pulls)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def jacobian_of(problem: Problem, theta: Array) -> Array:
    """d log L / d (E, A, B, p, q) at every point: [R, 5, n]; its first row is 1 / L."""
    a, b = theta[:, A, None], theta[:, B, None]
    jacobian = np.empty((len(theta), 5, len(problem.u)))
    jacobian[:, A] = np.exp(-theta[:, P, None] * problem.u)
    jacobian[:, B] = np.exp(-theta[:, Q, None] * problem.v)
    jacobian[:, E] = 1 / (theta[:, E, None] + a * jacobian[:, A] + b * jacobian[:, B])
    jacobian[:, A] *= jacobian[:, E]
    jacobian[:, B] *= jacobian[:, E]
    jacobian[:, P] = -a * problem.u * jacobian[:, A]
    jacobian[:, Q] = -b * problem.v * jacobian[:, B]
    return jacobian


def _free(problem: Problem, theta: Array, gradient: Array) -> NDArray[np.bool_]:
    """Parameters [R, 5] that no bound holds back; an exponent whose term is zero is held too."""
    held = (theta <= problem.lower) & (gradient >= 0) | (theta >= problem.upper) & (gradient <= 0)
    held[:, P] |= theta[:, A] == 0
    held[:, Q] |= theta[:, B] == 0
    return ~held


def _step(problem: Problem, theta: Array, at: _Expansion, floor: Array) -> tuple[Array, Array]:
    """The step [R, 5], and what it would gain by the expansion [R]."""
    free = _free(problem, theta, at.gradient)
    step, gain = _newton(at, free, floor)
    # The others may push a parameter against its bound: then it stays there, and they step without it.
    outward = (theta <= problem.lower) & (step < 0) | (theta >= problem.upper) & (step > 0)
    return _newton(at, free & ~outward, floor) if outward.any() else (step, gain)


def _newton(at: _Expansion, free: NDArray[np.bool_], floor: Array) -> tuple[Array, Array]:
    """Newton's step of the free parameters, and its gain; no curvature, relative to the majoriser, below the floor."""
    both, identity = free[:, :, None] & free[:, None, :], np.eye(5)
    held = identity * ~free[:, :, None]
    scale = 1 / np.sqrt(np.maximum(np.where(free, np.diagonal(at.majoriser, axis1=1, axis2=2), 1.0), 1e-300))
    outer = scale[:, :, None] * scale[:, None, :]
    hessian = np.where(both, at.hessian * outer, 0.0) + held
    majoriser = np.where(both, at.majoriser * outer, 0.0) + held + _RIDGE * identity
    inverse = np.linalg.inv(np.linalg.cholesky(majoriser))
    values, vectors = np.linalg.eigh(inverse @ hessian @ inverse.swapaxes(1, 2))
    to_eigen = vectors.swapaxes(1, 2) @ inverse
    gradient = np.where(free, at.gradient * scale, 0.0)
    along = np.einsum("rij,rj->ri", to_eigen, gradient)
    curvature = np.maximum(np.abs(values), floor[:, None])
    step = -np.einsum("rij,ri->rj", to_eigen, along / curvature) * scale
    return step, 0.5 * np.sum(along * along / curvature, axis=1)
