"""The law in size and data: L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3).

N is the number of parameters, D the images (or tokens) seen. Residuals are r = log L(N, D) - log value; the objective
is a sum over points, not a mean:

    huber   sum of r^2 / 2 up to |r| = delta and delta (|r| - delta / 2) beyond; 1e-3 as published
    lad     sum of |r|, which is what huber / delta goes to (Besiroglu et al. 2024 in effect publish this one)
    lsq     sum of w r^2, where w = (value / stderr)^2 if every point has a standard error, else 1

Huber and lad weigh all points alike, as published, whatever their standard errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special  # not scipy.stats, which takes a second to import

from evaluation.scaling import size_data_solver as solver
from evaluation.scaling.points import Array, Point, columns
from evaluation.scaling.robust import Loss, huber, huber_pull, objective
from evaluation.scaling.size_data_bootstrap import SizeDataBootstrap, bootstrap_size_data
from evaluation.scaling.size_data_curve import Scales, SizeDataCurve, scales_of

Status = Literal[
    "ok",
    "invalid",  # values, sizes or amounts of data that are not finite and positive
    "too_few_points",
    "one_size",  # all points are of one size: a learning curve, not a law in size
    "one_amount_of_data",
    "degenerate",  # too few different sizes or amounts of data, or the two lie on one line, or equal values
    "not_decreasing",  # the value falls neither with size nor with data
    "unidentified",  # a term is not needed, or at its bound, or an interval has no end
]
NUM_PARAMETERS = 5
MIN_POINTS = 7  # two degrees of freedom are the least from which a scatter can be judged
MIN_DIFFERENT = 3  # two sizes are joined by any exponent
MIN_LOG_SPAN = float(np.log(2))
MAX_CORRELATION = 0.9999  # of log N and log D: beyond, one may stand for the other
UNIDENTIFIED_WIDTH = 0.5  # E counts as unknown where its interval covers this share of what is possible
_RATES = np.geomspace(0.05, 40.0, 8)  # starting exponents, over the whole range of sizes and of data
_LAD_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_AGREE = 1e-6  # relative difference of objectives that counts as none


@dataclass(frozen=True)
class SizeDataFit:
    """A fitted L(N, D) and its certificate. Numbers that the status forbids are None."""

    status: Status
    message: str  # why the status is what it is, in plain words; empty for "ok"
    loss: Loss
    delta: float  # of the Huber loss, in units of log value
    num_points: int
    num_runs: int
    curve: SizeDataCurve | None = None
    objective: float | None = None  # the SUM that the module's docstring defines, at the optimum
    objective_mean: float | None = None  # over points
    num_starts: int = 0
    share_of_starts: float | None = None  # of the starts, those that end at this optimum
    # Largest |sum| over sum of |terms| of the gradient's components, of those no bound holds: 0 at a stationary point.
    imbalance: float | None = None
    # Of the Gauss-Newton matrix in (log A, log B, log E, alpha, beta): how hard it is for a general-purpose optimiser;
    # and of what is left of it for (alpha, beta) where the rest is projected out, as it is here.
    condition_number: float | None = None
    projected_condition_number: float | None = None
    r2_log: float | None = None  # of log value, unweighted
    bootstrap: SizeDataBootstrap | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the bootstrap's single rounds; what is not finite is for the caller to replace."""
        bare = dataclasses.replace(self, curve=None, bootstrap=None)
        value = dataclasses.asdict(bare)
        if self.curve is not None:
            value["curve"] = self.curve.to_json()
        if self.bootstrap is not None:
            value["bootstrap"] = self.bootstrap.to_json()
        return value


def fit_size_data(
    points: Sequence[Point],
    *,
    loss: Loss = "huber",
    delta: float = 1e-3,
    num_rounds: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> SizeDataFit:
    """Fit L(N, D) to all the points given; the global optimum over a grid of starts.

    Args:
        points: of one metric; num_params is N, images is D.
        delta: where the Huber loss turns linear, in units of log value.
        num_rounds, confidence, seed: of the bootstrap over runs; 0 rounds: none.
    """
    num_runs = len({p.run for p in points})
    refusal = _refusal(points)
    if refusal is not None:
        return SizeDataFit(*refusal, loss, delta, len(points), num_runs)
    scales = scales_of(points)
    weights = point_weights(points, loss)
    problem = solver.problem_of(scales.u, scales.v, scales.log_y)
    minima = solve(problem, weights, solver.starts(problem, weights, _RATES), loss, delta)
    best = int(np.argmin(minima.objective))
    theta = minima.theta[best]
    fit = SizeDataFit(
        "ok", "", loss, delta, len(points), num_runs,
        num_starts=len(minima.objective),
        share_of_starts=float(np.mean(minima.objective <= minima.objective[best] * (1 + _AGREE) + 1e-24)),
    )  # fmt: skip
    if theta[solver.A] == 0 or theta[solver.B] == 0:
        return dataclasses.replace(fit, **_flat(theta))
    residual = solver.residuals(problem, theta[None])[0]
    total = float(objective(residual, weights, loss, delta))
    full, projected = _conditions(scales, problem, weights, theta)
    fit = dataclasses.replace(
        fit,
        curve=scales.curve(theta),
        objective=total,
        objective_mean=total / len(points),
        imbalance=float(minima.imbalance[best]),
        condition_number=full,
        projected_condition_number=projected,
        r2_log=1 - float(np.sum(residual**2) / np.sum((scales.log_y - scales.log_y.mean()) ** 2)),
    )
    if num_rounds > 0:
        rounds = bootstrap_size_data(
            problem, weights, theta, columns(points), scales, lambda rows, w, start: _warm(rows, w, start, loss, delta),
            num_rounds=num_rounds, confidence=confidence, seed=seed,
        )  # fmt: skip
        fit = dataclasses.replace(fit, bootstrap=rounds)
    status, message = _status(fit, problem, weights, theta, residual, min(p.value for p in points))
    return dataclasses.replace(fit, status=status, message=message)


def point_weights(points: Sequence[Point], loss: Loss) -> Array:
    """Weight of each point [n]: by its standard error for lsq, where all have one; else 1."""
    c = columns(points)
    return np.ones(len(points)) if loss != "lsq" or c.stderr is None else (c.value / c.stderr) ** 2


def solve(problem: solver.Problem, weights: Array, start: Array, loss: Loss, delta: float) -> solver.Minima:
    """The minima of one of the losses from many starts. Those of lad are reached by Huber's with delta towards 0."""
    if loss == "lsq":
        return solver.minimise(problem, weights, start, np.inf)
    if loss == "huber":
        # Straight to the loss, and by way of least squares: the two see different basins.
        loose = solver.minimise(problem, weights, start, np.inf, 1e-4)
        return solver.minimise(problem, weights, np.concatenate([start, loose.theta]), delta)
    minima = solver.minimise(problem, weights, start, _LAD_DELTAS[0], 1e-6)
    for smaller in _LAD_DELTAS[1:]:
        minima = solver.minimise(problem, weights, minima.theta, smaller)
    return minima


def _warm(problem: solver.Problem, weights: Array, start: Array, loss: Loss, delta: float) -> Array:
    """The parameters [R, 5] of a bootstrap's rounds, each from its start, to far less than their scatter."""
    deltas = {"huber": (delta,), "lsq": (np.inf,), "lad": _LAD_DELTAS[1:4]}[loss]
    for smaller in deltas:
        start = solver.minimise(problem, weights, start, smaller, 1e-9).theta
    return start


def _refusal(points: Sequence[Point]) -> tuple[Status, str] | None:
    """The status of points that no L(N, D) can be fitted to."""
    table = np.array([(p.num_params, p.images, p.value) for p in points], dtype=np.float64).reshape(-1, 3)
    num_bad = int((~(np.isfinite(table) & (table > 0)).all(axis=1)).sum())
    if num_bad:
        return "invalid", f"{num_bad} of {len(table)} points lack a size, images seen or a value, finite and positive."
    if len(table) < MIN_POINTS:
        return "too_few_points", f"{len(table)} points; five parameters need at least {MIN_POINTS}."
    n, d, y = table.T
    if len(np.unique(n)) == 1:
        return "one_size", "all points are of one model size: this is its learning curve, not a law in size."
    if len(np.unique(d)) == 1:
        return "one_amount_of_data", "all points have seen the same images: nothing says what more data would do."
    for name, x in (("sizes", n), ("amounts of data", d)):
        if len(np.unique(x)) < MIN_DIFFERENT:
            return "degenerate", f"only {len(np.unique(x))} different {name}: any exponent joins them."
        if np.ptp(np.log(x)) < MIN_LOG_SPAN:
            return "degenerate", f"the {name} differ by a factor of only {x.max() / x.min():.3g}."
    if np.ptp(y) <= 1e-12 * y.max():
        return "degenerate", "all values are equal: there is nothing to fit."
    if abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > MAX_CORRELATION:
        return "degenerate", "size and data change only together: their exponents cannot be told apart."
    return None


def _flat(theta: Array) -> dict[str, Any]:
    """The status of a fit that lacks a term."""
    if theta[solver.A] == theta[solver.B] == 0:
        return {"status": "not_decreasing", "message": "the value falls neither with size nor with data."}
    what = "size" if theta[solver.A] == 0 else "data"
    return {"status": "unidentified", "message": f"the value does not fall with {what}: that term's best size is 0."}


def _conditions(scales: Scales, problem: solver.Problem, weights: Array, theta: Array) -> tuple[float, float]:
    """Condition numbers of the Gauss-Newton matrix in (log A, log B, log E, alpha, beta), and of its projection."""
    normal = solver.expand(problem, weights[None], theta[None], np.inf).majoriser[0]
    chain = np.zeros((5, 5))  # of the solver's parameters by those
    chain[solver.E, 2] = theta[solver.E] or 1.0  # where E = 0: by E itself
    chain[solver.A, [0, 3]] = theta[solver.A] * np.array([1.0, -scales.log_n.min()])
    chain[solver.B, [1, 4]] = theta[solver.B] * np.array([1.0, -scales.log_d.min()])
    chain[solver.P, 3], chain[solver.Q, 4] = np.ptp(scales.log_n), np.ptp(scales.log_d)
    full = chain.T @ normal @ chain
    projected = full[3:, 3:] - full[3:, :3] @ np.linalg.solve(full[:3, :3], full[:3, 3:])
    return float(np.linalg.cond(full)), float(np.linalg.cond(projected))


def _status(
    fit: SizeDataFit, problem: solver.Problem, weights: Array, theta: Array, residual: Array, least: float
) -> tuple[Status, str]:
    """Whether the points determine all five parameters."""
    rates = theta[[solver.P, solver.Q]]
    if ((rates <= solver.MIN_RATE) | (rates >= solver.MAX_RATE)).any():
        return "unidentified", "an exponent runs to the end of its range: the points do not bend as this form does."
    if theta[solver.E] == 0:
        return "unidentified", "the best irreducible E is 0: the points do not show one."
    for name, term, dof in (("E", solver.E, 1), ("A N^-alpha", solver.A, 2), ("B D^-beta", solver.B, 2)):
        if not _needed(fit, problem, weights, residual, term, dof):
            return "unidentified", f"without the term {name} the points are fitted about as well."
    rounds = fit.bootstrap
    if rounds is None or rounds.status == "failed":
        return ("ok", "") if rounds is None else ("unidentified", f"bootstrap: {rounds.message}")
    lost = 1 - rounds.num_valid / rounds.num_rounds
    if lost > (1 - rounds.confidence) / 2:
        return "unidentified", f"{lost:.0%} of the bootstrap's rounds do not determine the exponents."
    low, high = rounds.intervals["E"]
    if high - low >= UNIDENTIFIED_WIDTH * least:
        return "unidentified", f"any irreducible E from {low:.4g} to {high:.4g} fits about as well."
    return "ok", ""


def _needed(fit: SizeDataFit, problem: solver.Problem, weights: Array, residual: Array, term: int, dof: int) -> bool:
    """Whether leaving a term out worsens the objective by more than scatter explains.

    The ratio test of M-estimators (Hampel et al. 1986, section 7.2): 2 * gain * mean(rho'') / mean(rho'^2) is about
    chi^2. Points are taken as independent, so it errs towards "needed"; the bootstrap, by run, has the last word.
    """
    delta = {"huber": fit.delta, "lsq": np.inf, "lad": _LAD_DELTAS[-1]}[fit.loss]
    without = solver.problem_of(problem.u, problem.v, problem.log_y, without=term)
    start = solver.starts(without, weights, _RATES[1::2])
    restricted = float(solver.minimise(without, weights, start, delta, 1e-6).objective.min())
    gain = restricted - float(np.sum(weights * huber(residual, delta)))
    reach = max(delta, float(np.median(np.abs(residual))))
    curvature = np.mean(np.abs(residual) <= reach) * min(1.0, delta / reach) if np.isfinite(delta) else 1.0
    dof_left = len(residual) - NUM_PARAMETERS
    scatter = float(np.sum(weights * huber_pull(residual, delta) ** 2)) / dof_left
    return 2 * gain * float(curvature) > scatter * dof * float(special.fdtri(dof, dof_left, 0.95))
