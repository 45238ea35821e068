"""The one entry: points of one metric -> frontier, slopes, fits with intervals, hold-out errors, and plain words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.scaling.fitting.fits import Fit
from evaluation.scaling.fitting.forms import Form
from evaluation.scaling.frontier import (
    MIN_IMAGES,
    Frontier,
    Slope,
    find_frontier,
    slopes_by_run,
    slopes_by_size,
)
from evaluation.scaling.holdout import HoldOut, backtest, hold_out
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.one_fit import OneFit, fit_forms, with_intervals
from evaluation.scaling.points import Point, require_one_kind
from evaluation.scaling.verdict import describe


@dataclass(frozen=True)
class LawFit(OneFit):
    """One form, fitted to the frontier and tested beyond a cut."""

    hold_out: HoldOut


@dataclass(frozen=True)
class Law:
    """All that was found about one metric against training compute."""

    metric: str
    split: str
    flop_convention: str
    data: str
    measured: str
    frontier: Frontier
    run_slopes: tuple[Slope, ...]
    size_slopes: tuple[Slope, ...]
    fits: tuple[LawFit, ...]  # one a form, in the order of FORMS
    backtest: tuple[HoldOut, ...]  # fits below several cuts, held against what came later
    notes: tuple[str, ...]  # how well the law holds, in plain words; the first is the verdict

    def of(self, form: Form) -> LawFit:
        """The fit of one form."""
        return next(f for f in self.fits if f.fit.form == form)

    @property
    def best(self) -> LawFit | None:
        """The fit that describes the frontier best (AICc), of those that may be drawn; None where there is none."""
        drawn = [f for f in self.fits if f.fit.curve is not None and f.fit.status == "ok"]
        return min(drawn, key=lambda f: math.inf if f.fit.aicc is None else f.fit.aicc, default=None)

    @property
    def has_fit(self) -> bool:
        """Whether any form gave a curve."""
        return any(f.fit.curve is not None for f in self.fits)

    @property
    def verdict(self) -> str:
        return self.notes[0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes null."""
        value = dataclasses.asdict(self)
        for entry, law_fit in zip(value["fits"], self.fits, strict=True):
            entry["status"] = law_fit.status
        plain = plain_json(value)
        assert isinstance(plain, dict)
        return plain


def fit_law(
    points: Sequence[Point],
    *,
    min_images: int = MIN_IMAGES,
    constant: float | None = None,
    settings: Settings | None = None,
) -> Law:
    """Fit the compute-scaling law of one metric.

    Args:
        points: of one metric, split, FLOP convention, data set and way of measuring, from any number of runs.
        min_images: points seen before this many training images are not fitted.
        constant: a known irreducible value, for the form `power`; None: 0.
        settings: how the intervals are made.

    Raises:
        DataError: points that must not be mixed. Anything else that is wrong with them is a status of the fits.
    """
    require_one_kind(points)
    settings = settings or Settings()
    frontier = find_frontier(points, min_images=min_images)
    found = fit_forms(frontier, constant=constant, confidence=settings.confidence)
    fits = tuple(_law_fit(frontier, fitted, constant, settings) for fitted in found.values())
    one_size = any(f.fit.status == "one_size" for f in fits)
    first = points[0] if points else Point("", "", math.nan, None, math.nan, "", 0, 0, "", 0)
    law = Law(
        metric=first.metric,
        split=first.split,
        flop_convention=first.flop_convention,
        data=first.data,
        measured=first.measured,
        frontier=frontier,
        run_slopes=slopes_by_run(frontier.admitted),
        size_slopes=slopes_by_size(frontier.admitted),
        fits=fits,
        backtest=() if one_size else backtest(frontier, constant=constant),
        notes=(),
    )
    return dataclasses.replace(law, notes=tuple(describe(law)))


def _law_fit(frontier: Frontier, fitted: Fit, constant: float | None, settings: Settings) -> LawFit:
    """One form on the frontier, with its intervals and its test beyond the cut."""
    found = with_intervals(frontier, fitted, select=True, constant=constant, settings=settings)
    if fitted.status == "one_size":
        return LawFit(fitted, None, HoldOut(fitted.form, "one_size", fitted.message, math.nan, 0))
    return LawFit(fitted, found.uncertainty, hold_out(frontier, fitted.form, constant=constant))


def plain_json(value: Any) -> Any:
    """Dataclass dicts as plain JSON values: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
