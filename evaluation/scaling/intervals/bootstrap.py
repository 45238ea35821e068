"""Intervals over runs, since the points of one run are not independent.

Runs are **redrawn**: every round draws new runs from the fitted spread between runs and along them (redraw.py), and
selects the frontier again. Where many runs are fitted as they are, without a frontier, they are **resampled** with
replacement instead, which assumes nothing of how they are spread. All rounds are solved at once. Where simulated
studies showed intervals to cover too seldom (docs/scaling.md), they are called uncalibrated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from evaluation.scaling.fitting.fits import Fit
from evaluation.scaling.frontier import Frontier, frontier_mask
from evaluation.scaling.intervals.redraw import redraw
from evaluation.scaling.intervals.rounds import Draws, Question, solve_rounds
from evaluation.scaling.intervals.spread import MIN_DOF, Smoother, Spread, spread_about_law, spread_of_curves
from evaluation.scaling.intervals.summary import ends
from evaluation.scaling.intervals.uncertainty import MIN_VALID_SHARE, Method, Uncertainty, UncertaintyStatus
from evaluation.scaling.points import Array, Columns, columns
from evaluation.scaling.seeds import averaging, mean_names

MIN_RESAMPLED_RUNS = 30  # with fewer, percentiles over resampled runs are too narrow

_UNKNOWN = (
    "how much runs differ that are alike but for their seed cannot be told from these: the intervals only hint at the "
    "uncertainty. Train several seeds a size."
)
_SINGLE_SEED = (
    "sizes with a single seed are on the frontier, and who is ahead there is partly luck: the intervals may miss the "
    "truth more often than they say. Train several seeds a size."
)
_UNTRIED = "how often intervals of a break hold the truth has not been tried out for a frontier."
# Single points may scatter by this share of the whole fall of the frontier (in logs). In simulated studies with three
# seeds a size coverage was 91 to 95 % at 0.02, 90 to 95 % at 0.03, and 87 to 95 % at 0.06.
MAX_SCATTER = 0.04
MANY_CANDIDATES = 500  # from here on those far off the frontier are left out of the rounds
_OUT_OF_REACH = 8.0  # standard deviations


@dataclass(frozen=True)
class Settings:
    """How intervals are made."""

    num_rounds: int = 1000
    confidence: float = 0.95
    seed: int = 0
    run_spread: float | None = None  # standard deviation of log value between seeds, where it is known


@dataclass(frozen=True)
class _Basis:
    """What intervals rest on."""

    method: Method
    spread: Spread | None
    num_runs: int
    num_frontier_runs: int
    doubt: str  # why they cannot be held to what they say; empty where they can


def frontier_uncertainty(frontier: Frontier, fit: Fit, question: Question, settings: Settings) -> Uncertainty:
    """Intervals of a form that was fitted to the frontier, which is selected again in every round."""
    spread = spread_of_curves(frontier.admitted, settings.run_spread)
    num_runs = len({p.run for p in frontier.candidates})
    if len(frontier.candidates) > MANY_CANDIDATES:
        frontier = _contenders(frontier, spread)
    c = columns(frontier.candidates)
    mean = Smoother(c)(np.log(c.value)[None])[0]
    average = averaging(frontier.admitted, frontier.candidates)
    drawn = redraw(columns(frontier.admitted), spread, num_rounds=settings.num_rounds, seed=settings.seed)
    log_values = mean + drawn @ average.T
    counts = frontier_mask(c, log_values).astype(np.float64)
    centre = (np.exp(mean), frontier_mask(c, mean[None])[0].astype(np.float64))
    on_frontier = frontier_mask(c, np.log(c.value)[None])[0]
    num_seeds = int((average[on_frontier] > 0).sum(axis=1).min())
    doubt = _doubt(spread) or _frontier_doubt(frontier, spread, num_seeds)
    if fit.form == "broken":
        doubt = doubt or _UNTRIED
    basis = _Basis("redraw", spread, num_runs, len({p.run for p in frontier.points}), doubt)
    draws = Draws(c.compute, np.exp(log_values), c.stderr, counts, centre)
    return _uncertainty(draws, fit, question, settings, basis)


def _contenders(frontier: Frontier, spread: Spread) -> Frontier:
    """The frontier without the candidates that no draw would bring near it: thousands of them would take minutes."""
    logs = np.log([p.value for p in frontier.candidates])  # by compute
    near = logs - np.minimum.accumulate(logs) <= _OUT_OF_REACH * float(np.hypot(spread.between, spread.within)) + 1e-9
    kept = [p for p, stays in zip(frontier.candidates, near, strict=True) if stays]
    names, places = mean_names(frontier.admitted), {(p.run, p.compute) for p in kept}
    admitted = [p for p in frontier.admitted if (names[p.run], p.compute) in places]
    return replace(frontier, candidates=tuple(kept), admitted=tuple(admitted))


def fit_uncertainty(c: Columns, fit: Fit, question: Question, settings: Settings) -> Uncertainty:
    """Intervals of a form that was fitted to all points of `c`."""
    num_runs, everything = len(c.runs), np.ones_like(c.value)
    if num_runs >= MIN_RESAMPLED_RUNS:
        draws = Draws(c.compute, c.value, c.stderr, _resampled(num_runs, c, settings), (c.value, everything))
        return _uncertainty(draws, fit, question, settings, _Basis("resample", None, num_runs, num_runs, ""))
    assert fit.curve is not None
    law = fit.curve(c.compute)
    residual = np.log(c.value) - np.log(law)
    scale = _relative_errors(c, law)
    spread = spread_about_law(c, residual, fit.num_parameters, settings.run_spread, scale)
    drawn = redraw(c, spread, num_rounds=settings.num_rounds, seed=settings.seed, scale=scale)
    log_values = np.log(law) + drawn
    draws = Draws(c.compute, np.exp(log_values), c.stderr, np.ones_like(log_values), (law, everything))
    return _uncertainty(draws, fit, question, settings, _Basis("redraw", spread, num_runs, num_runs, _doubt(spread)))


def _uncertainty(draws: Draws, fit: Fit, question: Question, settings: Settings, basis: _Basis) -> Uncertainty:
    common = (basis.num_runs, basis.num_frontier_runs, settings.num_rounds)
    if basis.num_runs < 2 and (basis.spread is None or basis.spread.source != "given"):
        message = "one run: nothing says how runs differ."
        return Uncertainty("failed", message, "none", *common, 0, settings.confidence)
    rounds = solve_rounds(draws, question)
    num_valid = len(rounds.band)
    if num_valid < 0.5 * settings.num_rounds:
        message = f"the form could be fitted in only {num_valid} of {settings.num_rounds} rounds."
        return Uncertainty("failed", message, "none", *common, num_valid, settings.confidence)
    assert fit.curve is not None
    fitted = fit.curve(question.max_compute * np.array(question.factors))
    values, taken = draws.centre
    centre = solve_rounds(Draws(draws.compute, values, draws.stderr, taken[None], draws.centre), question)
    intervals, band, predictions = ends(rounds, centre, question, fitted, settings.confidence)
    status: UncertaintyStatus
    status, message = ("uncalibrated", basis.doubt) if basis.doubt else ("ok", "")
    if num_valid < MIN_VALID_SHARE * settings.num_rounds:
        status = "unstable"
        message = f"the form could not be fitted in {settings.num_rounds - num_valid} of {settings.num_rounds} rounds."
    return Uncertainty(
        status, message, basis.method, *common, num_valid, settings.confidence, intervals,
        tuple(question.band_compute.tolist()), tuple(band[0].tolist()), tuple(band[1].tolist()), predictions,
        basis.spread,
    )  # fmt: skip


def _doubt(spread: Spread) -> str:
    """Why intervals that are drawn from this spread cannot be held to what they say."""
    if spread.between_dof >= MIN_DOF:
        return ""
    if spread.source == "unknown":
        return _UNKNOWN
    return (
        f"the spread between runs rests on {spread.between_dof:g} degree(s) of freedom, of which {MIN_DOF} are needed: "
        "the intervals only hint at the uncertainty. Train more seeds."
    )


def _frontier_doubt(frontier: Frontier, spread: Spread, num_seeds: int) -> str:
    """Why a frontier may favour lucky curves so much that the intervals miss.

    Args:
        num_seeds: the fewest that a point on the frontier is the mean of.
    """
    if num_seeds < 2:
        return _SINGLE_SEED
    values = [p.value for p in frontier.points]
    fall = float(np.log(max(values) / min(values)))
    scatter = float(np.hypot(spread.between, spread.within) / np.sqrt(num_seeds))
    if scatter <= MAX_SCATTER * fall:
        return ""
    return (
        f"points of the frontier scatter by {scatter:.1%}, and it falls by {-np.expm1(-fall):.0%} in all: who is ahead "
        "is largely luck, and the intervals may miss the truth more often than they say. Train more seeds a size."
    )


def _relative_errors(c: Columns, law: Array) -> Array | None:
    """The standard errors of the points, relative to their values and to one another [n]; None without any."""
    if c.stderr is None:
        return None
    errors = c.stderr / law
    return np.asarray(errors / np.exp(np.log(errors).mean()))


def _resampled(num_runs: int, c: Columns, settings: Settings) -> Array:
    """How often each point takes part in each round: [R, n]."""
    rng = np.random.default_rng(settings.seed)
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=settings.num_rounds)  # [R, runs]
    return np.asarray(drawn[:, c.run], dtype=np.float64)
