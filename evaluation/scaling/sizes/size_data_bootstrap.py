"""Intervals of L(N, D) over runs: the points of one run are not independent, whatever their number.

As for the laws in compute: many runs are **resampled**, whole, which assumes nothing of how they scatter; few are
**redrawn** from the spread between runs and along them (redraw.py), so that no round lacks a size. Every round starts
from the full fit and takes a few Newton steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.intervals.redraw import redraw
from evaluation.scaling.intervals.spread import MIN_DOF, Spread
from evaluation.scaling.intervals.uncertainty import MIN_VALID_SHARE, Method, UncertaintyStatus
from evaluation.scaling.points import Array, Columns, Interval
from evaluation.scaling.sizes import size_data_solver as solver
from evaluation.scaling.sizes.distinct import distinct
from evaluation.scaling.sizes.size_data_curve import Scales

MIN_RESAMPLED_RUNS = 50  # five parameters: percentiles over fewer resampled runs cover too seldom (89 % at 36 runs)
MIN_DIFFERENT = 3  # sizes, and amounts of data, in a round
NAMES = ("E", "A", "alpha", "B", "beta", "size_exponent", "data_exponent")
_BLOCK = 1 << 21  # residuals of all rounds handled at once: bounds memory

Solve = Callable[[solver.Problem, Array, Array], Array]  # (problem, weights [R, n], starts [R, 5]) -> theta [R, 5]


@dataclass(frozen=True)
class SizeDataBootstrap:
    """Percentile intervals of the parameters, and of the exponents of N* ~ C^a and D* ~ C^b."""

    status: UncertaintyStatus
    message: str  # empty for "ok"
    method: Method
    num_runs: int
    num_rounds: int
    num_valid: int  # rounds that determine all five parameters: no term or exponent at its bound (E = 0 is allowed)
    confidence: float
    intervals: dict[str, Interval] = field(default_factory=dict)  # by name, as in NAMES
    stderr: dict[str, float] = field(default_factory=dict)  # standard deviation over rounds, by name
    samples: Array = field(default_factory=lambda: np.empty((0, 5)), repr=False, compare=False)

    def interval(self, values: Array) -> tuple[Array, Array]:
        """Ends of the percentile interval of values [V, ...] of the rounds, along the first axis."""
        low, high = np.percentile(values, [50 * (1 - self.confidence), 50 * (1 + self.confidence)], axis=0)
        return low, high

    def predict(self, num_params: Array, images: Array) -> Array:
        """The value at points [m] by every valid round: [V, m]."""
        constant, log_a, alpha, log_b, beta = self.samples.T[:, :, None]
        by_size = np.exp(log_a - alpha * np.log(num_params))
        return np.asarray(constant + by_size + np.exp(log_b - beta * np.log(images)))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "samples"}


@dataclass(frozen=True)
class FullFit:
    """The fit that the rounds vary."""

    problem: solver.Problem
    weights: Array  # [n]
    theta: Array  # [5]
    columns: Columns
    scales: Scales
    solve: Solve  # descends from given starts

    def rounds(self, problem: solver.Problem, weights: Array) -> Array:
        """Parameters [R, 5] of rounds with these values and weights [R, n], each from the full fit."""
        return self.solve(problem, weights, np.tile(self.theta, (len(weights), 1)))


def bootstrap_size_data(
    full: FullFit, *, num_rounds: int, confidence: float, seed: int, run_spread: float | None = None
) -> SizeDataBootstrap:
    """Refit every round.

    Args:
        run_spread: standard deviation of log value between runs that differ in seed alone, where it is known.
    """
    num_runs, spread = len(full.columns.runs), None
    step = max(1, _BLOCK // len(full.weights))
    blocks = [(min(step, num_rounds - i), seed + i) for i in range(0, num_rounds, step)]  # rounds, and their seed
    if num_runs >= MIN_RESAMPLED_RUNS:
        found = np.concatenate([_resampled(full, *block) for block in blocks])
    else:
        residual = -solver.residuals(full.problem, full.theta[None])[0]
        spread = _spread(full, residual, run_spread)
        found = np.concatenate([_redrawn(full, residual, spread, *block) for block in blocks])
    found = found[_inside(found)]
    status, message = _status(spread, len(found), num_rounds)
    method: Method = "resample" if spread is None else "redraw"
    result = SizeDataBootstrap(status, message, method, num_runs, num_rounds, len(found), confidence)
    return result if status == "failed" else _with_samples(result, full.scales.parameters(found))


def _with_samples(result: SizeDataBootstrap, samples: Array) -> SizeDataBootstrap:
    constant, log_a, alpha, log_b, beta = samples.T
    with np.errstate(over="ignore"):
        named = [constant, np.exp(log_a), alpha, np.exp(log_b), beta, beta / (alpha + beta), alpha / (alpha + beta)]
    values = np.stack(named, axis=1)  # [V, names]
    low, high = result.interval(values)
    return replace(
        result,
        intervals={name: (float(a), float(b)) for name, a, b in zip(NAMES, low, high, strict=True)},
        stderr=dict(zip(NAMES, values.std(axis=0).tolist(), strict=True)),
        samples=samples,
    )


def _resampled(full: FullFit, num_rounds: int, seed: int) -> Array:
    """Parameters [V, 5] of the rounds of resampled runs that have enough sizes and amounts of data."""
    rng, num_runs = np.random.default_rng(seed), len(full.columns.runs)
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_rounds)
    counts = drawn[:, full.columns.run].astype(np.float64)
    sizes, amounts = (_num_different(logs, counts) for logs in (full.scales.log_n, full.scales.log_d))
    enough = (sizes >= MIN_DIFFERENT) & (amounts >= MIN_DIFFERENT)
    return full.rounds(full.problem, counts[enough] * full.weights)


def _redrawn(full: FullFit, residual: Array, spread: Spread, num_rounds: int, seed: int) -> Array:
    """Parameters [num_rounds, 5] of rounds of new runs about the law."""
    problem = full.problem
    log_y = problem.log_y - residual + redraw(full.columns, spread, num_rounds=num_rounds, seed=seed)
    rows = solver.Problem(problem.u, problem.v, log_y, problem.upper)
    return full.rounds(rows, np.broadcast_to(full.weights, log_y.shape))


def _spread(full: FullFit, residual: Array, given: float | None) -> Spread:
    """The spread of runs about the law [n]: of their levels, and of points about their run's level.

    The law's five degrees of freedom are taken partly from the levels and partly from what varies along the runs; how
    many from each is the trace of the Gauss-Newton hat matrix over the levels.
    """
    run, counts = full.columns.run, np.bincount(full.columns.run)
    level = np.bincount(run, weights=residual) / counts
    rest = residual - level[run]
    jacobian = solver.jacobian_of(full.problem, full.theta[None])[0]  # [5, n]
    means = np.stack([np.bincount(run, weights=row) / counts for row in jacobian])
    taken = float(np.trace(np.linalg.pinv(jacobian @ jacobian.T, hermitian=True) @ ((means * counts) @ means.T)))
    between_dof = len(counts) - taken
    within_dof = max(1.0, len(residual) - len(counts) - (len(full.theta) - taken))
    within = float(np.sqrt(rest @ rest / within_dof))
    if given is not None:
        own = within / np.sqrt(np.exp(np.log(counts).mean()))
        return Spread(float(np.hypot(given, own)), np.inf, within, within_dof, "given")
    if between_dof < 0.5:
        return Spread(float(np.sqrt(residual @ residual / within_dof)), 0, within, within_dof, "unknown")
    return Spread(float(np.sqrt(level @ level / between_dof)), between_dof, within, within_dof, "residuals")


def _num_different(logs: Array, counts: Array) -> NDArray[np.int64]:
    """How many different values [n] take part in each round: [R]."""
    labels = distinct(logs)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    return np.asarray((np.add.reduceat(counts[:, order], starts, axis=1) > 0).sum(axis=1))


def _inside(theta: Array) -> NDArray[np.bool_]:
    """Rounds whose size and data terms exist, with exponents inside their range: [R]."""
    terms = (theta[:, solver.A] > 0) & (theta[:, solver.B] > 0)
    rates = theta[:, [solver.P, solver.Q]]
    return np.asarray(terms & (rates > solver.MIN_RATE).all(axis=1) & (rates < solver.MAX_RATE).all(axis=1))


def _status(spread: Spread | None, num_valid: int, num_rounds: int) -> tuple[UncertaintyStatus, str]:
    if num_valid < max(2, 0.5 * num_rounds):
        return "failed", f"only {num_valid} of {num_rounds} rounds determine the parameters."
    if num_valid < MIN_VALID_SHARE * num_rounds:
        return "unstable", f"{num_rounds - num_valid} of {num_rounds} rounds do not determine the parameters."
    if spread is not None and spread.source != "given" and spread.between_dof < MIN_DOF:
        return "uncalibrated", (
            "runs are too few to tell how much they scatter about the law: the intervals only hint at the "
            "uncertainty. Train several seeds a size, or give the spread if it is known (run_spread)."
        )
    return "ok", ""
