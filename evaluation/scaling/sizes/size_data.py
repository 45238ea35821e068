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
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from evaluation.scaling.points import Array, Point, columns
from evaluation.scaling.sizes import size_data_solver as solver
from evaluation.scaling.sizes.robust import Loss, objective
from evaluation.scaling.sizes.size_data_bootstrap import FullFit, SizeDataBootstrap, bootstrap_size_data
from evaluation.scaling.sizes.size_data_checks import Status, doubt, far_points, missing_term, refusal
from evaluation.scaling.sizes.size_data_curve import SizeDataCurve, scales_of

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
    outliers: tuple[int, ...] = ()  # numbers of the points that lie far off the law; Huber and lad hardly follow them
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
    run_spread: float | None = None,
) -> SizeDataFit:
    """Fit L(N, D) to all the points given; the global optimum over a grid of starts.

    Args:
        points: of one metric; num_params is N, images is D.
        delta: where the Huber loss turns linear, in units of log value.
        num_rounds, confidence, seed: of the bootstrap over runs; 0 rounds: none.
        run_spread: standard deviation of log value between runs that differ in seed alone, where it is known.

    Raises:
        UserError: a delta that is not positive. Anything that is wrong with the points is a status.
    """
    if not delta > 0:
        raise UserError(f"the Huber loss turns linear at a positive delta, such as 0.001, not at {delta:g}.")
    num_runs = len({p.run for p in points})
    refused = refusal(points)
    if refused is not None:
        return SizeDataFit(*refused, loss, delta, len(points), num_runs)
    scales = scales_of(points)
    problem, weights = solver.problem_of(scales.u, scales.v, scales.log_y), point_weights(points, loss)
    minima = solver.solve(problem, weights, solver.starts(problem, weights, solver.START_RATES), loss, delta)
    best = int(np.argmin(minima.objective))
    missing = missing_term(minima.theta[best])
    if missing is not None:
        return SizeDataFit(*missing, loss, delta, len(points), num_runs)
    full = FullFit(
        problem, weights, minima.theta[best], columns(points), scales,
        lambda *rows: solver.solve_near(loss, delta, *rows),
    )  # fmt: skip
    rounds = None
    if num_rounds > 0:
        rounds = bootstrap_size_data(
            full, num_rounds=num_rounds, confidence=confidence, seed=seed, run_spread=run_spread
        )
    fit = SizeDataFit(*doubt(full, loss, delta, rounds), loss, delta, len(points), num_runs, bootstrap=rounds)
    return _certified(fit, full, minima, best)


def _certified(fit: SizeDataFit, full: FullFit, minima: solver.Minima, best: int) -> SizeDataFit:
    """The fit with its curve and all that says how well it was found."""
    residual = solver.residuals(full.problem, full.theta[None])[0]
    total = float(objective(residual, full.weights, fit.loss, fit.delta))
    log_y = full.scales.log_y
    conditions = _conditions(full)
    return dataclasses.replace(
        fit,
        curve=full.scales.curve(full.theta),
        objective=total,
        objective_mean=total / fit.num_points,
        num_starts=len(minima.objective),
        share_of_starts=float(np.mean(minima.objective <= minima.objective[best] * (1 + _AGREE) + 1e-24)),
        imbalance=float(minima.imbalance[best]),
        condition_number=conditions[0],
        projected_condition_number=conditions[1],
        outliers=far_points(residual),
        r2_log=1 - float(np.sum(residual**2) / np.sum((log_y - log_y.mean()) ** 2)),
    )


def point_weights(points: Sequence[Point], loss: Loss) -> Array:
    """Weight of each point [n]: by its standard error for lsq, where all have one; else 1."""
    c = columns(points)
    return np.ones(len(points)) if loss != "lsq" or c.stderr is None else (c.value / c.stderr) ** 2


def _conditions(full: FullFit) -> tuple[float, float]:
    """Condition numbers of the Gauss-Newton matrix in (log A, log B, log E, alpha, beta), and of its projection."""
    theta, scales = full.theta, full.scales
    normal = solver.expand(full.problem, full.weights[None], theta[None], np.inf).majoriser[0]
    chain = np.zeros((5, 5))  # of the solver's parameters by those
    chain[solver.E, 2] = theta[solver.E] or 1.0  # where E = 0: by E itself
    chain[solver.A, [0, 3]] = theta[solver.A] * np.array([1.0, -scales.log_n.min()])
    chain[solver.B, [1, 4]] = theta[solver.B] * np.array([1.0, -scales.log_d.min()])
    chain[solver.P, 3], chain[solver.Q, 4] = np.ptp(scales.log_n), np.ptp(scales.log_d)
    whole = chain.T @ normal @ chain
    projected = whole[3:, 3:] - whole[3:, :3] @ np.linalg.solve(whole[:3, :3], whole[:3, 3:])
    return float(np.linalg.cond(whole)), float(np.linalg.cond(projected))
