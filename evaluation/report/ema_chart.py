"""How a metric depends on the length of the average of the weights that is measured."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.report.chart import Axis, Chart, Panel, Series, log_axis
from evaluation.report.palette import INK
from evaluation.report.style import metric_label, split_label
from trainer.tracking.records import EvalRecord

Point = tuple[float, EvalRecord]  # the relative length of a power profile, and what was measured of its average


def ema_chart(curves: Sequence[Sequence[Point]], *, title: str) -> Chart:
    """A panel a curve, which is one metric measured in one way; with bars of one standard error where there are any."""
    return Chart(title, (tuple(_panel(curve) for curve in curves),), size=(5.0 * len(curves) + 0.6, 3.8))


def _panel(curve: Sequence[Point]) -> Panel:
    lengths, values = [sigma_rel for sigma_rel, _ in curve], [record.value for _, record in curve]
    errors = [record.stderr or 0.0 for _, record in curve]
    low = min(v - e for v, e in zip(values, errors, strict=True))
    high = max(v + e for v, e in zip(values, errors, strict=True))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    first = curve[0][1]
    y = Axis(metric_label(first.metric), low - room, high + room, log=False)
    hover = [(f"sigma_rel {length:g}", f"{value:.5g}") for length, value in zip(lengths, values, strict=True)]
    bars = (errors, errors) if any(errors) else None
    series = Series(lengths, values, INK, width=1.2, marker="dot", error=bars, hover=hover)
    return Panel(
        log_axis("relative length of the average (sigma_rel)", lengths), y, (series,), title=split_label(first.split)
    )
