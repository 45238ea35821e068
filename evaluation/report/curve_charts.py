"""Learning curves: value against images seen."""

from __future__ import annotations

import math

from evaluation.report.chart import Axis, Chart, Panel, Series, log_axis
from evaluation.report.palette import MUTED, size_groups
from evaluation.report.run_series import Words, by_run, curve_series, drawn_points, measured_points, run_series
from evaluation.report.style import law_title
from evaluation.scaling.law import Law
from evaluation.scaling.seeds import average_seeds

X_LABEL = "images seen in training"


def curves_chart(law: Law, *, title: str | None = None) -> Chart | None:
    """Every run's value against the images it has seen, by size; None where the points do not say how many."""
    points = drawn_points(law)
    if not points or any(p.images <= 0 for p in points):
        return None
    name = law_title(law.metric, law.split)
    values = [v for p in points for v in (p.value, p.value + (p.stderr or 0.0))]
    x = log_axis(X_LABEL, [float(p.images) for p in points], ticks="power")
    series = tuple(run_series(law, size_groups([p.num_params for p in points]), "images"))
    return Chart(f"Learning curves: {name}" if title is None else title, ((Panel(x, log_axis(name, values), series),),))


def gap_chart(law: Law, *, title: str | None = None) -> Chart | None:
    """A difference, which may be negative, against images seen, on an axis that is not logarithmic.

    Every run is drawn, and the mean over seeds with bars of one standard error.
    """
    points = [p for p in measured_points(law) if math.isfinite(p.value) and p.images > 0]
    if not points:
        return None
    name = law_title(law.metric, law.split)
    ends = [p.value + sign * (p.stderr or 0.0) for p in points for sign in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.06 * (high - low) or 1.0
    x = log_axis(X_LABEL, [float(p.images) for p in points], ticks="power")
    y = Axis(name, low - room, high + room, log=False)
    words = Words(law)
    series = [Series([x.low, x.high], [0.0, 0.0], MUTED, width=0.8)]
    for group in size_groups([p.num_params for p in points]):
        own = [p for p in points if p.num_params in group.sizes]
        series.append(curve_series(by_run(own), group, "images", words, size=2.5, width=0.7, opacity=0.5, errors=False))
        series.append(curve_series(by_run(average_seeds(own)), group, "images", words, label=group.label))
    return Chart(name if title is None else title, ((Panel(x, y, tuple(series)),),))
