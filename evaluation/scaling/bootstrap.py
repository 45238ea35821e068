"""Intervals over runs, since the points of one run are not independent.

Runs are **redrawn**: every round draws new runs from the fitted spread between runs and along them (redraw.py), and
selects the frontier again. Where many runs are fitted as they are, without a frontier, they are **resampled** with
replacement instead, which assumes nothing of how they are spread. All rounds are solved at once. docs/scaling.md says
how often the intervals cover.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from evaluation.scaling.fits import Fit
from evaluation.scaling.forms import AnyCurve
from evaluation.scaling.frontier import Frontier, frontier_mask
from evaluation.scaling.points import Array, Columns, columns
from evaluation.scaling.redraw import redraw, seeds_of_means
from evaluation.scaling.rounds import Draws, Question, failed, solve_rounds, summarise
from evaluation.scaling.spread import MIN_DOF, Spread, smoothed, spread_about_law, spread_of_curves
from evaluation.scaling.uncertainty import Method, Uncertainty, UncertaintyStatus

MIN_RESAMPLED_RUNS = 30  # with fewer, percentiles over resampled runs are too narrow
_SINGLE_SEED = (
    "sizes with a single seed are on the frontier, and who is ahead there is partly luck: the intervals may miss the "
    "truth more often than they say. Train several seeds a size."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How intervals are made."""

    num_rounds: int = 1000
    confidence: float = 0.95
    seed: int = 0
    run_spread: float | None = None  # standard deviation of log value between seeds, where it is known


def frontier_uncertainty(frontier: Frontier, fit: Fit, question: Question, settings: Settings) -> Uncertainty:
    """Intervals of a form that was fitted to the frontier, which is selected again in every round."""
    c = columns(frontier.candidates)
    spread = spread_of_curves(frontier.admitted, settings.run_spread)
    mean, _ = smoothed(c)
    seeds = seeds_of_means(c, frontier.admitted)
    log_values = redraw(c, mean, spread, num_seeds=seeds, num_rounds=settings.num_rounds, seed=settings.seed)
    counts = frontier_mask(c, log_values).astype(np.float64)
    centre = (np.exp(mean), frontier_mask(c, mean[None])[0].astype(np.float64))
    draws = Draws(c.compute, np.exp(log_values), c.stderr, counts, centre)
    reached = {p.run for p in frontier.points}
    alone = any(seeds[c.runs.index(run)] < 2 for run in reached)
    found = _uncertainty(draws, fit, question, settings, "redraw", spread, (len(c.runs), len(reached)))
    if alone and found.status == "ok":
        return dataclasses.replace(found, status="uncalibrated", message=_SINGLE_SEED)
    return found


def fit_uncertainty(c: Columns, fit: Fit, question: Question, settings: Settings) -> Uncertainty:
    """Intervals of a form that was fitted to all points of `c`."""
    num_runs, everything = len(c.runs), np.ones_like(c.value)
    if num_runs >= MIN_RESAMPLED_RUNS:
        draws = Draws(c.compute, c.value, c.stderr, _resampled(num_runs, c, settings), (c.value, everything))
        return _uncertainty(draws, fit, question, settings, "resample", None, (num_runs, num_runs))
    assert fit.curve is not None
    law = fit.curve(c.compute)
    residual = np.log(c.value) - np.log(law)
    spread = spread_about_law(c, residual, fit.num_parameters, settings.run_spread)
    log_values = redraw(c, np.log(law), spread, num_rounds=settings.num_rounds, seed=settings.seed)
    draws = Draws(c.compute, np.exp(log_values), c.stderr, np.ones_like(log_values), (law, everything))
    return _uncertainty(draws, fit, question, settings, "redraw", spread, (num_runs, num_runs))


def _uncertainty(
    draws: Draws, fit: Fit, question: Question, settings: Settings, method: Method, spread: Spread | None,
    num_runs: tuple[int, int],
) -> Uncertainty:  # fmt: skip
    if max(num_runs) < 2 and (spread is None or spread.source != "given"):
        return failed("one run: nothing says how runs differ.", *num_runs, settings.num_rounds, settings.confidence)
    rounds = solve_rounds(draws, question)
    curve: AnyCurve | None = fit.curve
    assert curve is not None
    fitted = curve(question.max_compute * np.array(question.factors))
    status, message, intervals, band, predictions = summarise(
        rounds, question, fitted, num_rounds=settings.num_rounds, confidence=settings.confidence
    )
    if status == "ok":
        status, message = _calibration(spread)
    return Uncertainty(
        status, message, method, *num_runs, settings.num_rounds, len(rounds.band), settings.confidence, intervals,
        tuple(question.band_compute.tolist()) if band.size else (), tuple(band[0].tolist()), tuple(band[1].tolist()),
        predictions, spread,
    )  # fmt: skip


def _calibration(spread: Spread | None) -> tuple[UncertaintyStatus, str]:
    """Whether the intervals can be held to what they say."""
    if spread is None or spread.between_dof >= MIN_DOF:
        return "ok", ""
    if spread.source == "unknown":
        return "uncalibrated", (
            "how much runs differ that are alike but for their seed cannot be told from these: the intervals only hint "
            "at the uncertainty. Train several seeds a size."
        )
    return "uncalibrated", (
        f"the spread between runs rests on {spread.between_dof:g} degree(s) of freedom, of which {MIN_DOF} are needed: "
        "the intervals only hint at the uncertainty. Train more seeds."
    )


def _resampled(num_runs: int, c: Columns, settings: Settings) -> Array:
    """How often each point takes part in each round: [R, n]."""
    rng = np.random.default_rng(settings.seed)
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=settings.num_rounds)  # [R, runs]
    return np.asarray(drawn[:, c.run], dtype=np.float64)
