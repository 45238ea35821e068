"""How well a law fitted to the cheap points predicts the dear ones: the test that matters for a scaling law.

The cut lies at a share of the frontier's range of **log** compute, so the distance that is extrapolated is a fixed part
of the range however the points are spread. The frontier below the cut is selected from points below the cut alone:
nothing of the held-out part is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.scaling.fitting.fits import Status, fit
from evaluation.scaling.fitting.forms import FORMS, Form
from evaluation.scaling.frontier import Frontier, find_frontier
from evaluation.scaling.points import Point, columns

LOWER_SHARE = 2 / 3
BACKTEST_SHARES = (0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class HeldOutPoint:
    """A frontier point beyond the cut and what the fit below the cut says of it."""

    point: Point
    predicted: float

    @property
    def relative_error(self) -> float:
        """(predicted - value) / value."""
        return (self.predicted - self.point.value) / self.point.value


@dataclass(frozen=True)
class HoldOut:
    """The errors of a fit below a cut of compute at the frontier points above."""

    form: Form
    status: Status  # of the fit below the cut; "too_few_points" also where nothing lies above
    message: str
    cut_compute: float
    num_fitted: int
    factor: float | None = None  # of compute from the last fitted point to the last held-out one
    points: tuple[HeldOutPoint, ...] = ()
    mean_relative_error: float | None = None  # mean |predicted - value| / value
    max_relative_error: float | None = None
    # The same mean for "it stays as good as the best point below the cut": a law must beat this to be of use.
    no_change_error: float | None = None


def backtest(frontier: Frontier, *, constant: float | None = None, select: bool = True) -> tuple[HoldOut, ...]:
    """Every form fitted below several cuts and held against what came later, by cut and form."""
    return tuple(
        hold_out(frontier, form, constant=constant, share=s, select=select) for s in BACKTEST_SHARES for form in FORMS
    )


def hold_out(
    frontier: Frontier, form: Form, *, constant: float | None = None, share: float = LOWER_SHARE, select: bool = True
) -> HoldOut:
    """Fit the frontier below the cut and measure the error above it.

    Args:
        constant: a known constant, for the form `power`.
        share: of the range of log compute, where the cut lies.
        select: the frontier below the cut from the candidates below it; otherwise `frontier.points` are fitted as
            they are.
    """
    known = constant if form == "power" else None
    if not frontier.points:
        return HoldOut(form, "too_few_points", "no frontier points.", float("nan"), 0)
    logs = np.log([p.compute for p in frontier.points])
    cut = float(np.exp(logs[0] + share * (logs[-1] - logs[0])))
    below = [p for p in (frontier.candidates if select else frontier.points) if p.compute <= cut]
    lower = find_frontier(below, min_images=0).points if select else tuple(below)
    above = [p for p in frontier.points if p.compute > cut]
    fitted = fit(columns(lower), form, constant=known)
    if fitted.curve is None or not above:
        message = fitted.message or "no frontier point lies above the cut."
        status: Status = fitted.status if fitted.curve is None else "too_few_points"
        return HoldOut(form, status, message, cut, len(lower))
    predicted = fitted.curve([p.compute for p in above])
    points = tuple(HeldOutPoint(p, float(y)) for p, y in zip(above, predicted, strict=True))
    errors = np.abs([p.relative_error for p in points])
    best = min(p.value for p in lower)
    unchanged = np.abs([(best - p.value) / p.value for p in above])
    return HoldOut(
        form, fitted.status, fitted.message, cut, len(lower),
        above[-1].compute / lower[-1].compute, points,
        float(errors.mean()), float(errors.max()), float(unchanged.mean()),
    )  # fmt: skip
