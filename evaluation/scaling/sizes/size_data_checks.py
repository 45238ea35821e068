"""Which points can have an L(N, D), and which fits of one can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special  # not scipy.stats, which takes a second to import

from evaluation.scaling.points import Array, Point
from evaluation.scaling.sizes import size_data_solver as solver
from evaluation.scaling.sizes.distinct import num_distinct
from evaluation.scaling.sizes.robust import Loss, huber, huber_pull
from evaluation.scaling.sizes.size_data_bootstrap import FullFit, SizeDataBootstrap

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
FAR = 10.0  # robust standard deviations, beyond which a point is named
_ROUNDING = 1e-9  # of log values
CONFIDENCE = 0.95  # that a term is needed
UNIDENTIFIED_WIDTH = 0.5  # E counts as unknown where its interval covers this share of what is possible


def refusal(points: Sequence[Point]) -> tuple[Status, str] | None:
    """The status of points that no L(N, D) can be fitted to."""
    table = np.array([(p.num_params, p.images, p.value) for p in points], dtype=np.float64).reshape(-1, 3)
    num_bad = int((~(np.isfinite(table) & (table > 0)).all(axis=1)).sum())
    if num_bad:
        return "invalid", f"{num_bad} of {len(table)} points lack a size, images seen or a value, finite and positive."
    if len(table) < MIN_POINTS:
        return "too_few_points", f"{len(table)} points; five parameters need at least {MIN_POINTS}."
    n, d, y = table.T
    num_sizes, num_amounts = num_distinct(np.log(n)), num_distinct(np.log(d))
    if num_sizes == 1:
        return "one_size", "all points are of one model size: this is its learning curve, not a law in size."
    if num_amounts == 1:
        return "one_amount_of_data", "all points have seen the same images: nothing says what more data would do."
    for name, x, num_different in (("sizes", n, num_sizes), ("amounts of data", d, num_amounts)):
        if num_different < MIN_DIFFERENT:
            return "degenerate", f"only {num_different} different {name}: any exponent joins them."
        if np.ptp(np.log(x)) < MIN_LOG_SPAN:
            return "degenerate", f"the {name} differ by a factor of only {x.max() / x.min():.3g}."
    if np.ptp(y) <= 1e-12 * y.max():
        return "degenerate", "all values are equal: there is nothing to fit."
    if abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > MAX_CORRELATION:
        return "degenerate", "size and data change only together: their exponents cannot be told apart."
    return None


def far_points(residual: Array) -> tuple[int, ...]:
    """Numbers of the points whose residuals [n] are no scatter like the others': more than ten robust deviations."""
    size = np.abs(residual)
    scale = max(1.4826 * float(np.median(size)), _ROUNDING)  # the standard deviation, if normal
    return tuple(np.flatnonzero(size > FAR * scale).tolist())


def missing_term(theta: Array) -> tuple[Status, str] | None:
    """The status of a fit that lacks a term, so that its exponent means nothing."""
    if theta[solver.A] == theta[solver.B] == 0:
        return "not_decreasing", "the value falls neither with size nor with data."
    if theta[solver.A] == 0 or theta[solver.B] == 0:
        what = "size" if theta[solver.A] == 0 else "data"
        return "unidentified", f"the value does not fall with {what}: that term's best coefficient is 0."
    return None


def doubt(full: FullFit, loss: Loss, delta: float, rounds: SizeDataBootstrap | None) -> tuple[Status, str]:
    """Whether the points determine all five parameters.

    Args:
        rounds: of the bootstrap, where there was one.
    """
    for name, term in (("A N^-alpha", solver.A), ("B D^-beta", solver.B)):
        if not _needed(full, loss, delta, term, 2):
            return "unidentified", f"without the term {name} the points are fitted about as well."
    rates = full.theta[[solver.P, solver.Q]]
    if ((rates <= solver.MIN_RATE) | (rates >= solver.MAX_RATE)).any():
        return "unidentified", "an exponent runs to the end of its range: the points do not bend as this form does."
    if full.theta[solver.E] == 0 or not _needed(full, loss, delta, solver.E, 1):
        return "unidentified", "without an irreducible E the points are fitted about as well."
    return ("ok", "") if rounds is None else _doubt_of_rounds(full, rounds)


def _doubt_of_rounds(full: FullFit, rounds: SizeDataBootstrap) -> tuple[Status, str]:
    if rounds.status == "failed":
        return "unidentified", f"bootstrap: {rounds.message}"
    lost = 1 - rounds.num_valid / rounds.num_rounds
    if lost > (1 - rounds.confidence) / 2:
        return "unidentified", f"{lost:.0%} of the bootstrap's rounds do not determine the exponents."
    low, high = rounds.intervals["E"]
    if high - low >= UNIDENTIFIED_WIDTH * full.columns.value.min():
        return "unidentified", f"any irreducible E from {low:.4g} to {high:.4g} fits about as well."
    return "ok", ""


def _needed(full: FullFit, loss: Loss, delta: float, term: int, dof: int) -> bool:
    """Whether leaving a term out worsens the objective by more than scatter explains.

    The ratio test of M-estimators (Hampel et al. 1986, section 7.2): 2 * gain * mean(rho'') / mean(rho'^2) is about
    chi^2. The scatter is widened by the design effect of runs, whose points err together (Kish 1965).
    """
    problem, weights, delta = full.problem, full.weights, solver.least_delta(loss, delta)
    residual = solver.residuals(problem, full.theta[None])[0]
    without = solver.problem_of(problem.u, problem.v, problem.log_y, without=term)
    start = solver.starts(without, weights, solver.START_RATES[1::2])
    restricted = float(solver.minimise(without, weights, start, delta, 1e-6).objective.min())
    gain = restricted - float(np.sum(weights * huber(residual, delta)))
    reach = max(delta, float(np.median(np.abs(residual))))
    curvature = np.mean(np.abs(residual) <= reach) * min(1.0, delta / reach) if np.isfinite(delta) else 1.0
    pull = huber_pull(residual, delta)
    dof_left = len(residual) - len(full.theta)
    scatter = float(np.sum(weights * pull**2)) / dof_left * _design_effect(pull * np.sqrt(weights), full.columns.run)
    return bool(2 * gain * curvature > scatter * dof * special.fdtri(dof, dof_left, CONFIDENCE))


def _design_effect(pull: Array, run: NDArray[np.int64]) -> float:
    """How much more a sum over points scatters than it would if points of one run were independent; at least 1."""
    total = float(pull @ pull)
    return max(1.0, float(np.sum(np.bincount(run, weights=pull) ** 2)) / total) if total > 0 else 1.0
