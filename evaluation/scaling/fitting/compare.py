"""Which form? Akaike's criterion on the same points, and what each says of points it has not seen (holdout.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from evaluation.scaling.fitting.fits import Fit
from evaluation.scaling.fitting.forms import FORMULAS

# A difference of ten leaves a form essentially without support (Burnham & Anderson 2002, section 2.6).
NO_SUPPORT = 10.0


def compare(fits: Sequence[Fit]) -> list[Fit]:
    """Fits of different forms to the same points; those that another sound one beats beyond doubt become `misfit`."""
    sound = [f for f in fits if f.aicc is not None and f.status in ("ok", "unidentified")]
    best = min(sound, key=_criterion, default=None)
    if best is None:
        return list(fits)
    message = f"{FORMULAS[best.form]} describes the same points far better"
    return [
        dataclasses.replace(f, status="misfit", message=f"{message} (AICc lower by {_difference(f, best)}).")
        if f.status == "ok" and f.aicc is not None and _criterion(f) - _criterion(best) > NO_SUPPORT
        else f
        for f in fits
    ]


def akaike_weights(fits: Sequence[Fit]) -> dict[str, float]:
    """The support of each form among those with a criterion; they add up to 1."""
    criteria = {f.form: f.aicc for f in fits if f.aicc is not None and math.isfinite(f.aicc)}
    least = min(criteria.values(), default=0.0)
    likelihood = {form: math.exp(-0.5 * (value - least)) for form, value in criteria.items()}
    return {form: value / sum(likelihood.values()) for form, value in likelihood.items()}


def _criterion(fit: Fit) -> float:
    return math.inf if fit.aicc is None else fit.aicc


def _difference(fit: Fit, best: Fit) -> str:
    difference = _criterion(fit) - _criterion(best)
    return f"{difference:.0f}" if math.isfinite(difference) else "any amount"
