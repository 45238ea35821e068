"""Bootstrap of L(N, D) by run: the points of one run are not independent, whatever their number.

Many runs are **resampled**: whole runs are drawn with replacement, which assumes nothing of how they scatter. Few runs
are **flipped** (the wild bootstrap by cluster, Cameron, Gelbach & Miller 2008): every round has all the points, and
turns the sign of a run's residuals, all together, with probability 1/2; so no round lacks a size. It assumes that
residuals are as likely above the law as below. Both start from the full fit, so a round takes a few Newton steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling import size_data_solver as solver
from evaluation.scaling.points import Array, Columns
from evaluation.scaling.size_data_curve import Scales

MIN_RESAMPLED_RUNS = 20  # with fewer, resampling leaves sizes out of many rounds
MIN_RUNS = 8  # fewer have too few different rounds for percentiles to mean what they say
MIN_VALID_SHARE = 0.8
MIN_DIFFERENT = 3  # sizes, and amounts of data, in a round
NAMES = ("E", "A", "alpha", "B", "beta", "size_exponent", "data_exponent")
_BLOCK = 1 << 21  # residuals of all rounds handled at once: bounds memory

Interval = tuple[float, float]
Solve = Callable[[solver.Problem, Array, Array], Array]  # (problem, weights [R, n], starts [R, 5]) -> theta [R, 5]


@dataclass(frozen=True)
class SizeDataBootstrap:
    """Percentile intervals of the parameters, and of the exponents of N* ~ C^a and D* ~ C^b."""

    status: Literal["ok", "too_few_runs", "unstable", "failed"]
    message: str  # empty for "ok"
    method: Literal["resample", "flip"]
    num_runs: int
    num_rounds: int
    num_valid: int  # rounds that determine all five parameters: no term or exponent at its bound (E = 0 is allowed)
    confidence: float
    intervals: dict[str, Interval] = field(default_factory=dict)  # by name, as in NAMES
    stderr: dict[str, float] = field(default_factory=dict)  # standard deviation over rounds, by name
    samples: Array = field(default_factory=lambda: np.empty((0, 5)), repr=False, compare=False)

    def interval(self, values: Array) -> tuple[Array, Array]:
        """Ends of the percentile interval of values [V, ...] of the rounds, along the first axis."""
        tails = [50 * (1 - self.confidence), 50 * (1 + self.confidence)]
        low, high = np.percentile(values, tails, axis=0)
        return low, high

    def predict(self, num_params: Array, images: Array) -> Array:
        """The value at points [m] by every valid round: [V, m]."""
        constant, log_a, alpha, log_b, beta = self.samples.T[:, :, None]
        return np.asarray(constant + np.exp(log_a - alpha * np.log(num_params)) + np.exp(log_b - beta * np.log(images)))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "samples"}


def bootstrap_size_data(
    problem: solver.Problem,
    weights: Array,
    theta: Array,
    c: Columns,
    scales: Scales,
    solve: Solve,
    *,
    num_rounds: int,
    confidence: float,
    seed: int,
) -> SizeDataBootstrap:
    """Refit every round from the full fit.

    Args:
        problem, weights, theta: of the full fit; weights [n].
        solve: descends from given starts.
    """
    num_runs = len(c.runs)
    method: Literal["resample", "flip"] = "resample" if num_runs >= MIN_RESAMPLED_RUNS else "flip"
    if num_runs < 2:
        return SizeDataBootstrap(
            "failed", "one run: nothing says how runs differ.", method, 1, num_rounds, 0, confidence
        )
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // len(weights))
    sizes = [min(step, num_rounds - i) for i in range(0, num_rounds, step)]
    round_block = _resampled if method == "resample" else _flipped
    found = np.concatenate([round_block(problem, weights, theta, c, solve, rng, size) for size in sizes])
    found = found[_inside(problem, found)]
    status, message = _status(num_runs, len(found), num_rounds)
    if status == "failed":
        return SizeDataBootstrap(status, message, method, num_runs, num_rounds, len(found), confidence)
    samples = scales.parameters(found)
    result = SizeDataBootstrap(status, message, method, num_runs, num_rounds, len(found), confidence, samples=samples)
    columns = _named(samples)
    low, high = result.interval(columns)
    intervals = {name: (float(a), float(b)) for name, a, b in zip(NAMES, low, high, strict=True)}
    stderr = dict(zip(NAMES, columns.std(axis=0).tolist(), strict=True))
    return SizeDataBootstrap(
        status, message, method, num_runs, num_rounds, len(found), confidence, intervals, stderr, samples
    )


def _resampled(
    problem: solver.Problem, weights: Array, theta: Array, c: Columns, solve: Solve, rng: np.random.Generator, size: int
) -> Array:
    """Parameters [V, 5] of the rounds of resampled runs that have enough sizes and amounts of data."""
    num_runs = len(c.runs)
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=size)
    counts = drawn[:, c.run].astype(np.float64)
    enough = (_num_different(problem.u, counts) >= MIN_DIFFERENT) & (_num_different(problem.v, counts) >= MIN_DIFFERENT)
    counts = counts[enough] * weights
    return solve(problem, counts, np.tile(theta, (len(counts), 1)))


def _flipped(
    problem: solver.Problem, weights: Array, theta: Array, c: Columns, solve: Solve, rng: np.random.Generator, size: int
) -> Array:
    """Parameters [size, 5] of the rounds in which the residuals of some runs are turned over."""
    residual = solver.residuals(problem, theta[None])[0]  # predicted - observed
    widened = residual * np.sqrt(len(residual) / (len(residual) - len(theta)))
    signs = rng.choice([-1.0, 1.0], size=(size, len(c.runs)))
    rows = solver.Problem(problem.u, problem.v, problem.log_y + residual + signs[:, c.run] * widened, problem.upper)
    return solve(rows, np.tile(weights, (size, 1)), np.tile(theta, (size, 1)))


def _num_different(values: Array, counts: Array) -> NDArray[np.int64]:
    """How many different values [n] take part in each round: [R]."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf) > 0)
    return np.asarray((np.add.reduceat(counts[:, order], starts, axis=1) > 0).sum(axis=1))


def _inside(problem: solver.Problem, theta: Array) -> NDArray[np.bool_]:
    """Rounds whose size and data terms exist, with exponents inside their range: [R]."""
    terms = (theta[:, solver.A] > 0) & (theta[:, solver.B] > 0)
    rates = theta[:, [solver.P, solver.Q]]
    return np.asarray(terms & (rates > solver.MIN_RATE).all(axis=1) & (rates < solver.MAX_RATE).all(axis=1))


def _named(samples: Array) -> Array:
    """The columns [V, 7] of NAMES."""
    constant, log_a, alpha, log_b, beta = samples.T
    with np.errstate(over="ignore"):
        a, b = np.exp(log_a), np.exp(log_b)
    return np.stack([constant, a, alpha, b, beta, beta / (alpha + beta), alpha / (alpha + beta)], axis=1)


def _status(
    num_runs: int, num_valid: int, num_rounds: int
) -> tuple[Literal["ok", "too_few_runs", "unstable", "failed"], str]:
    if num_valid < 0.5 * num_rounds or num_valid < 2:
        return "failed", f"only {num_valid} of {num_rounds} rounds determine the parameters."
    if num_runs < MIN_RUNS:
        return "too_few_runs", (
            f"{num_runs} runs: with fewer than {MIN_RUNS} the intervals only hint at the uncertainty "
            "and tend to be too narrow."
        )
    if num_valid < MIN_VALID_SHARE * num_rounds:
        return "unstable", f"{num_rounds - num_valid} of {num_rounds} rounds do not determine the parameters."
    return "ok", ""
