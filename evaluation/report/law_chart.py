"""The law's chart: every run's curve, the compute frontier, the fitted laws and beyond, and the residuals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from evaluation.report.chart import Axis, Band, Chart, Dash, Panel, Series, Shown, log_axis
from evaluation.report.law_numbers import legend_text
from evaluation.report.palette import INK, PAPER, SizeGroup, form_colour, size_groups
from evaluation.report.run_series import drawn_points, run_series
from evaluation.report.style import law_title
from evaluation.scaling.intervals.uncertainty import Prediction
from evaluation.scaling.law import Law, LawFit
from evaluation.scaling.paper import PublishedLaw, published
from evaluation.scaling.points import Array, Point

X_LABEL = "training compute (FLOPs)"
LEAST_RESIDUAL = 1e-3  # an exact fit's rounding is not worth a look
BEYOND = 3.0  # without predictions the laws are drawn this factor beyond the largest compute
OUTLIER = "does not belong to the others on the frontier"
FRONTIER, HELD_OUT = "frontier: no run is better at this compute", "frontier, upper third: held out to test the fits"


def law_chart(law: Law, *, title: str | None = None, paper: bool = False) -> Chart:
    """Value against training compute on log-log axes, and under it the residuals of the best fit.

    Curves are coloured by model size; where seeds repeat, each run is thin and their mean, which is fitted, strong.
    Bars are one standard error. Points that are not fitted because they come too early are faint. Laws whose
    parameters are not determined are named in the legend and not drawn.

    Args:
        title: default: the metric's name.
        paper: lay the published law over it and let the axes reach to its points. Otherwise it is drawn where the
            points reach its range of compute, and offered on the screen elsewhere.
    """
    points = drawn_points(law)
    title = law_title(law.metric, law.split) if title is None else title
    groups = size_groups([p.num_params for p in points])
    others = [(other, paper or _reaches(points, other)) for other in published(law.metric)]
    x, y = _axes(law, points, [other for other, shown in others if shown])
    series = (
        *run_series(law, groups, "compute"),
        *_published(others, x),
        *_laws(law),
        *_frontier(law),
        *_predictions(law),
    )
    message = "" if law.has_fit else f"no law fitted: {law.fits[0].fit.message}" if points else "no points to draw"
    below = _residual_panel(law, groups, x)
    if below is None:
        return Chart(title, ((Panel(x, y, series, tuple(_bands(law)), message=message),),), size=(8.6, 5.2))
    top = Panel(dataclasses.replace(x, label=""), y, series, tuple(_bands(law)), message=message)
    return Chart(title, ((top,), (below,)), heights=(3.4, 1.0), size=(8.6, 6.4))


def _frontier(law: Law) -> Iterator[Series]:
    points = law.frontier.points
    if points:
        x, y = [p.compute for p in points], [p.value for p in points]
        yield Series(x, y, INK, FRONTIER, marker="ring", size=9)
    strange = sorted({i for f in law.fits for i in f.fit.outliers if i < len(points)})
    if strange:
        x, y = [points[i].compute for i in strange], [points[i].value for i in strange]
        yield Series(x, y, INK, OUTLIER, marker="cross", size=11)
    held_out = next((f.hold_out.points for f in law.fits if f.hold_out.points), ())
    if held_out:
        x, y = [h.point.compute for h in held_out], [h.point.value for h in held_out]
        yield Series(x, y, INK, HELD_OUT, marker="square", size=13)


def _laws(law: Law) -> Iterator[Series]:
    """Solid over the frontier, dashed beyond."""
    for law_fit in law.fits:
        curve = law_fit.fit.curve
        if curve is None:
            continue
        low, high, width = law.frontier.points[0].compute, law.frontier.points[-1].compute, _width(law, law_fit)
        text, form = legend_text(law_fit), law_fit.fit.form
        shown: Shown = "yes" if law_fit.fit.status == "ok" else "named"
        parts: tuple[tuple[Array, str, float, Dash], ...] = (
            (np.geomspace(low, high, 100), text, width, "solid"),
            (np.geomspace(high, _far(law), 60), "", 0.8 * width, "dash"),
        )
        for grid, label, line, dash in parts:
            values = curve(grid)
            hover = [(text, f"{y:.4g} at {x:.3g} FLOPs") for x, y in zip(grid, values, strict=True)]
            yield Series(
                grid.tolist(), values.tolist(), form_colour(form), label, group=form, width=line, dash=dash,
                hover=hover, shown=shown,
            )  # fmt: skip


def _width(law: Law, law_fit: LawFit) -> float:
    return 1.9 if law_fit is law.best else 1.1


def _bands(law: Law) -> Iterator[Band]:
    """The best law's band."""
    best = law.best
    if best is not None and best.uncertainty is not None and best.uncertainty.band_compute:
        found = best.uncertainty
        yield Band(found.band_compute, found.band_low, found.band_high, form_colour(best.fit.form), best.fit.form)


def _predictions(law: Law) -> Iterator[Series]:
    """What the best law says of more compute, with intervals."""
    best = law.best
    found = best.uncertainty.predictions if best is not None and best.uncertainty is not None else ()
    if best is None or not found:
        return
    status = best.uncertainty.status if best.uncertainty is not None else "failed"
    doubt = "" if status == "ok" else f", {status}"
    factors = " and ".join(f"{p.factor:g}×" for p in found)
    colour, form = form_colour(best.fit.form), best.fit.form
    ends = [
        (p.compute, end) for p in found if p.low is not None and p.high is not None for end in (p.low, p.high, math.nan)
    ]
    yield Series([x for x, _ in ends], [end for _, end in ends], colour, group=form, width=1.6)
    yield Series(
        [p.compute for p in found], [p.value for p in found], colour,
        f"predicted at {factors} the compute (bars: interval{doubt})", group=form, marker="diamond", size=6,
        hover=[_prediction_hover(p, doubt) for p in found],
    )  # fmt: skip


def _prediction_hover(prediction: Prediction, doubt: str) -> tuple[str, ...]:
    interval = "no interval"
    if prediction.low is not None and prediction.high is not None:
        interval = f"interval {prediction.low:.4g} to {prediction.high:.4g}{doubt}"
    where = f"{prediction.factor:g}× the largest compute: {prediction.compute:.3g} FLOPs"
    return (where, f"predicted {prediction.value:.4g}", interval)


def _reaches(points: Sequence[Point], other: PublishedLaw) -> bool:
    """Whether the points' computes overlap those that the published law was seen at."""
    low, high = other.range_compute
    computes = [p.compute for p in points]
    return bool(computes) and min(computes) <= high and max(computes) >= low


def _published(others: Sequence[tuple[PublishedLaw, bool]], x: Axis) -> Iterator[Series]:
    """Laws of others: solid between the computes of their published points, dotted elsewhere."""
    for other, is_shown in others:
        shown: Shown = "yes" if is_shown else "offered"
        low, high = (min(max(end, x.low), x.high) for end in other.range_compute)
        yield _line(np.geomspace(x.low, x.high, 120), other, "dot", other.label, shown)
        if low < high:
            yield _line(np.geomspace(low, high, 40), other, "solid", "", shown)
        yield Series(
            [p.compute for p in other.points], [p.value for p in other.points], PAPER, group=other.label,
            marker="cross", size=6, shown=shown,
            hover=[(other.label, p.name, f"{p.value:g} at {p.compute:.3g} FLOPs") for p in other.points],
        )  # fmt: skip


def _line(grid: Array, other: PublishedLaw, dash: Dash, label: str, shown: Shown) -> Series:
    values = other.curve(grid)
    hover = [(other.label, f"{y:.4g} at {x:.3g} FLOPs") for x, y in zip(grid, values, strict=True)]
    return Series(
        grid.tolist(), values.tolist(), PAPER, label, group=other.label, width=1.3, dash=dash, hover=hover, shown=shown
    )


def _residual_panel(law: Law, groups: Sequence[SizeGroup], x: Axis) -> Panel | None:
    """(value - fit) / fit of the frontier points, under the best fit."""
    best = law.best
    if best is None or best.fit.curve is None or not law.frontier.points:
        return None
    points = law.frontier.points
    fitted = best.fit.curve([p.compute for p in points])
    rows = [(p, p.value / f - 1, (p.stderr or 0.0) / f) for p, f in zip(points, fitted.tolist(), strict=True)]
    series = [Series([x.low, x.high], [0.0, 0.0], form_colour(best.fit.form), width=1.2)]
    for group in groups:
        chosen = [row for row in rows if row[0].num_params in group.sizes]
        if not chosen:
            continue
        error = [e for _, _, e in chosen]
        series.append(
            Series(
                [p.compute for p, _, _ in chosen], [r for _, r, _ in chosen], group.colour, group=group.label,
                legend="sizes", marker="dot", error=(error, error) if any(error) else None,
                hover=[(p.run, f"{r:+.2%} from the fit", f"its own standard error: {e:.2%}") for p, r, e in chosen],
            )
        )  # fmt: skip
    reach = max(1.15 * max(abs(r) + e for _, r, e in rows), LEAST_RESIDUAL)
    return Panel(x, Axis("residual", -reach, reach, log=False, ticks="percent"), tuple(series))


def _axes(law: Law, points: Sequence[Point], others: Sequence[PublishedLaw]) -> tuple[Axis, Axis]:
    """Axes around points, predictions, and the published points that are to be shown."""
    label = law_title(law.metric, law.split)
    if not points:
        return Axis(X_LABEL, 1e10, 1e12, ticks="power"), Axis(label, 1, 10)
    computes = [p.compute for p in points]
    values = [p.value for p in points] + [p.value + (p.stderr or 0.0) for p in points]
    if law.has_fit:
        computes.append(_far(law))
    for law_fit in law.fits:
        if law_fit.fit.status == "ok" and law_fit.fit.curve is not None:
            values.append(float(law_fit.fit.curve(_far(law))))
    values += [v for p in _best_predictions(law) for v in (p.low, p.high) if v is not None]
    for other in others:
        computes += [p.compute for p in other.points]
        values += [p.value for p in other.points]
    floor = min(p.value for p in points) / 20  # an interval that reaches to nothing must not flatten the rest
    low, high = max(min(values), floor), max(values)
    room = (high / low) ** 0.06 if high > low else 1.1
    x = log_axis(X_LABEL, computes, ticks="power", room=0.04)
    return x, Axis(label, low / room, high * room)


def _far(law: Law) -> float:
    """Where the laws end."""
    return max([law.frontier.points[-1].compute * BEYOND, *(p.compute for p in _best_predictions(law))])


def _best_predictions(law: Law) -> tuple[Prediction, ...]:
    best: LawFit | None = law.best
    return best.uncertainty.predictions if best is not None and best.uncertainty is not None else ()
