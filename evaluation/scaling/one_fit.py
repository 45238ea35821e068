"""One form through points of any origin: the fit, held against the other forms, its intervals, one status for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluation.scaling.fitting.compare import compare
from evaluation.scaling.fitting.fits import Fit, Status, fit
from evaluation.scaling.fitting.forms import FORMS, Form
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
        if self.fit.status == "ok" and self.uncertainty is not None and self.uncertainty.status != "ok":
            return "uncalibrated"
        return self.fit.status


def fit_forms(
    frontier: Frontier, *, constant: float | None = None, confidence: float = 0.95, learning_curve: bool = False
) -> dict[Form, Fit]:
    """Every form through the frontier's points, each held against the others.

    Args:
        constant: a known constant, for the form `power`.
        confidence: of the profile interval of a fitted constant.
        learning_curve: points of one size are what is asked for; otherwise they are no law, and get no numbers.
    """
    c = columns(frontier.points)
    known: dict[Form, float | None] = {form: constant if form == "power" else None for form in FORMS}
    fits = [fit(c, form, constant=known[form], confidence=confidence) for form in FORMS]
    sizes = sorted({p.num_params for p in frontier.admitted})
    if len(sizes) == 1 and sizes[0] > 0 and not learning_curve:  # a size of 0 is unknown
        fits = [_one_size(f, sizes[0]) if f.curve is not None else f for f in fits]
    return {f.form: f for f in compare(fits)}


def with_intervals(
    frontier: Frontier, fitted: Fit, *, select: bool, constant: float | None, settings: Settings,
    factors: Sequence[float] = FACTORS,
) -> OneFit:  # fmt: skip
    """The fit with its intervals; none without numbers, without rounds, or of a break that is not there.

    Args:
        select: the points are the frontier of their candidates, to be selected again in every round; otherwise they
            are fitted as they are.
        factors: of the largest compute, where the law is asked to predict.
    """
    if fitted.curve is None or fitted.status == "no_break" or settings.num_rounds == 0:
        return OneFit(fitted, None)
    known = constant or 0.0 if fitted.form == "power" else 0.0
    low, high = frontier.points[0].compute, frontier.points[-1].compute
    band = np.geomspace(low, high * BAND_BEYOND, BAND_POINTS)
    question = Question(fitted.form, known, fitted.curve.reference_compute, high, band, tuple(factors))
    if select:
        return OneFit(fitted, frontier_uncertainty(frontier, fitted, question, settings))
    return OneFit(fitted, fit_uncertainty(columns(frontier.points), fitted, question, settings))


def fit_one(
    frontier: Frontier,
    form: Form,
    *,
    select: bool,
    constant: float | None = None,
    settings: Settings | None = None,
    factors: Sequence[float] = FACTORS,
    learning_curve: bool = False,
) -> OneFit:
    """One form with its intervals; the arguments are those of `fit_forms` and `with_intervals`."""
    settings = settings or Settings()
    fits = fit_forms(frontier, constant=constant, confidence=settings.confidence, learning_curve=learning_curve)
    return with_intervals(frontier, fits[form], select=select, constant=constant, settings=settings, factors=factors)


def _one_size(fitted: Fit, size: int) -> Fit:
    message = f"all points are of one model size ({size:,}): its learning curve, not a scaling law."
    return Fit(fitted.form, "one_size", message, fitted.num_points)
