"""Bootstrap by run: whole runs are drawn with replacement, since the points of one run are not independent.

Inside every round the frontier is selected again from the runs that were drawn, then the form is fitted again; so the
luck of which run happened to be best enters the intervals. A round is a row of weights (how often the point's run was
drawn, zero off the round's frontier), and all rounds are solved at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.fits import MIN_LOG_SPAN, MIN_POINTS, Form, base_weights, scale_of
from evaluation.scaling.frontier import domination
from evaluation.scaling.points import Array, Columns, Point, columns
from evaluation.scaling.solver import solve_power, solve_power_constant
from evaluation.scaling.uncertainty import Interval, Uncertainty, UncertaintyStatus

# Fewer runs than this have too few different resamples for percentiles to mean what they say.
MIN_RUNS = 8
# If fewer runs than this make up the frontier, most rounds select the very same points.
MIN_FRONTIER_RUNS = 4
MIN_VALID_SHARE = 0.8


def bootstrap(
    candidates: Sequence[Point],
    form: Form,
    *,
    reference_compute: float,
    band_compute: Array,
    constant: float = 0.0,
    frontier: bool = True,
    num_rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Uncertainty:
    """Percentile intervals over rounds of resampled runs.

    Args:
        candidates: all admitted points (not only the frontier's), positive and finite.
        reference_compute: where the amplitude is taken.
        band_compute: computes [m] at which the curve's band is wanted.
        constant: known constant of the form `power`.
        frontier: select the frontier inside the loop; without, every point of a drawn run is fitted.
    """
    c = columns(candidates)
    num_runs = len(c.runs)
    num_fitted_runs = len(np.unique(c.run[~domination(c).any(axis=1)])) if frontier else num_runs
    if num_runs < 2:
        message = "one run: there is nothing to resample."
        return Uncertainty("failed", message, num_runs, num_fitted_runs, num_rounds, 0, confidence)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_rounds)  # [R, runs]
    counts = _round_counts(c, drawn, frontier)  # [R, n]
    valid = _determined(c, counts, form)
    curves = _curves(c, counts[valid], form, constant, reference_compute, band_compute)
    num_valid = len(curves[0])
    if num_valid < 0.5 * num_rounds:
        message = f"the form could be fitted in only {num_valid} of {num_rounds} rounds."
        return Uncertainty("failed", message, num_runs, num_fitted_runs, num_rounds, num_valid, confidence)
    status, message = _status(num_runs, num_fitted_runs, num_valid, num_rounds)
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    exponent, constants, amplitude, band = (np.percentile(values, tails, axis=0) for values in curves)
    intervals = {"exponent": _pair(exponent), "constant": _pair(constants), "amplitude": _pair(amplitude)}
    return Uncertainty(
        status, message, num_runs, num_fitted_runs, num_rounds, num_valid, confidence, intervals,
        tuple(band_compute.tolist()), tuple(band[0].tolist()), tuple(band[1].tolist()),
    )  # fmt: skip


def _round_counts(c: Columns, drawn: NDArray[np.int64], frontier: bool) -> Array:
    """How often each point takes part in each round: [R, n]."""
    counts = drawn[:, c.run].astype(np.float64)
    if frontier:
        beaters = (drawn > 0).astype(np.float32) @ domination(c).T.astype(np.float32)  # [R, n]: drawn runs that beat it
        counts[beaters > 0] = 0.0
    return counts


def _determined(c: Columns, counts: Array, form: Form) -> NDArray[np.bool_]:
    """Rounds with enough different computes, far enough apart, to determine the form: [R]."""
    order = np.argsort(c.compute, kind="stable")
    log_compute = np.log(c.compute[order])
    starts = np.flatnonzero(np.diff(log_compute, prepend=-np.inf) > 0)  # where a new compute begins
    present = np.add.reduceat(counts[:, order], starts, axis=1) > 0  # [R, computes]
    x = log_compute[starts]
    span = np.where(present, x, -np.inf).max(axis=1) - np.where(present, x, np.inf).min(axis=1)
    return np.asarray((present.sum(axis=1) >= MIN_POINTS[form] - 1) & (span >= MIN_LOG_SPAN))


def _curves(
    c: Columns, counts: Array, form: Form, constant: float, reference: float, band_compute: Array
) -> tuple[Array, Array, Array, Array]:
    """Exponents, constants, amplitudes [V] and curves [V, m] of the rounds that have a decreasing fit."""
    scale = scale_of(c.compute)
    t, weights = scale.t(c.compute), counts * base_weights(c, form, constant)
    if form == "power":
        solutions = solve_power(t, np.log(c.value - constant), weights)
    else:
        lowest = np.where(counts > 0, c.value, np.inf).min(axis=1, initial=np.inf)
        solutions = solve_power_constant(t, c.value, weights, np.zeros(len(counts)), lowest * (1 - 1e-9))
    kept = np.isfinite(solutions.objective) & (solutions.beta > 0) & (solutions.amplitude > 0)
    beta, amplitude = solutions.beta[kept], solutions.amplitude[kept]
    constants = solutions.constant[kept] + constant
    band = constants[:, None] + amplitude[:, None] * np.exp(-beta[:, None] * scale.t(band_compute))
    return beta / scale.span, constants, amplitude * np.exp(-beta * scale.t(reference)), band


def _status(num_runs: int, num_fitted_runs: int, num_valid: int, num_rounds: int) -> tuple[UncertaintyStatus, str]:
    if num_runs < MIN_RUNS or num_fitted_runs < MIN_FRONTIER_RUNS:
        return "uncalibrated", (
            f"{num_runs} runs, {num_fitted_runs} of them on the frontier: with fewer than {MIN_RUNS} and "
            f"{MIN_FRONTIER_RUNS} the intervals only hint at the uncertainty and tend to be too narrow."
        )
    if num_valid < MIN_VALID_SHARE * num_rounds:
        return "unstable", f"the form could not be fitted in {num_rounds - num_valid} of {num_rounds} rounds."
    return "ok", ""


def _pair(values: Array) -> Interval:
    return float(values[0]), float(values[1])
