"""One form through points of any origin: the fit, its intervals, and one status for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluation.scaling.fitting.compare import compare
from evaluation.scaling.fitting.fits import Fit, Status, fit
from evaluation.scaling.fitting.forms import Form
from evaluation.scaling.frontier import Frontier
from evaluation.scaling.intervals.bootstrap import Settings, fit_uncertainty, frontier_uncertainty
from evaluation.scaling.intervals.rounds import Question
from evaluation.scaling.intervals.uncertainty import Uncertainty
from evaluation.scaling.points import columns

BAND_POINTS = 96
BAND_BEYOND = 100.0  # the band goes this factor beyond the largest compute, as far as the predictions
FACTORS = (10.0, 100.0)  # of the largest compute: where a law is asked to predict

FitStatus = Literal[Status, "uncalibrated"]


@dataclass(frozen=True)
class OneFit:
    """A form, fitted."""

    fit: Fit
    uncertainty: Uncertainty | None  # None where there is no fit, or where none was asked for

    @property
    def status(self) -> FitStatus:
        """The fit's status; a sound fit whose intervals cannot be held to what they say is `uncalibrated`."""
        return status_of(self.fit, self.uncertainty)


def status_of(fit: Fit, uncertainty: Uncertainty | None) -> FitStatus:
    """One status for a fit and its intervals."""
    if fit.status == "ok" and uncertainty is not None and uncertainty.status != "ok":
        return "uncalibrated"
    return fit.status


def fit_one(
    frontier: Frontier,
    form: Form,
    *,
    select: bool,
    constant: float | None = None,
    settings: Settings | None = None,
    factors: Sequence[float] = FACTORS,
) -> OneFit:
    """Fit the frontier's points.

    Args:
        select: the points are the frontier of their candidates, to be selected again in every round; otherwise they
            are fitted as they are.
        constant: a known constant, for the form `power`.
        settings: of the intervals; no rounds, no intervals.
        factors: of the largest compute, where the law is asked to predict.
    """
    settings = settings or Settings()
    known = constant if form == "power" else None
    c = columns(frontier.points)
    fitted = fit(c, form, constant=known, confidence=settings.confidence)
    if form == "power" and fitted.curve is not None:  # is it straight at all?
        fitted = compare([fitted, fit(c, "power_constant", confidence=settings.confidence)])[0]
    if fitted.curve is None or fitted.status == "no_break" or settings.num_rounds == 0:
        return OneFit(fitted, None)  # the place of a break that is not there has no interval
    low, high = frontier.points[0].compute, frontier.points[-1].compute
    band = np.geomspace(low, high * BAND_BEYOND, BAND_POINTS)
    question = Question(form, known or 0.0, fitted.curve.reference_compute, high, band, tuple(factors))
    if select:
        return OneFit(fitted, frontier_uncertainty(frontier, fitted, question, settings))
    return OneFit(fitted, fit_uncertainty(c, fitted, question, settings))
