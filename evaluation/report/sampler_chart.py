"""What samplers make of one network: a metric against the network calls that a sample takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.report.chart import Axis, Chart, Marker, Panel, Series, log_axis
from evaluation.report.palette import MUTED, category_colour
from evaluation.report.style import metric_label

_MARKERS: tuple[Marker, ...] = ("dot", "square", "diamond", "cross", "ring")


@dataclass(frozen=True)
class CallPoint:
    """One measurement."""

    way: str  # the sampler's name; for a bound, that it is one
    metric: str
    num_calls: int  # network calls a sample, or terms of the bound
    value: float
    stderr: float | None
    floor: float | None = None  # what real images get against real images


def sampler_chart(points: Sequence[CallPoint], *, title: str) -> Chart:
    """A panel a metric, a line a sampler; where a floor is known it is drawn as well."""
    metrics = list(dict.fromkeys(point.metric for point in points))
    ways = list(dict.fromkeys(point.way for point in points))
    panels = [_panel([p for p in points if p.metric == m], ways, last=m == metrics[-1]) for m in metrics]
    return Chart(
        title, tuple((panel,) for panel in panels), heights=(1.0,) * len(panels), size=(7.6, 1.0 + 3.4 * len(panels))
    )


def _panel(points: Sequence[CallPoint], ways: Sequence[str], *, last: bool) -> Panel:
    x = log_axis("network calls a sample" if last else "", [float(p.num_calls) for p in points])
    ends = [v for p in points for v in (p.value, p.value + (p.stderr or 0.0))]
    floors = [p.floor for p in points if p.floor]
    series = [_line(points, way, number) for number, way in enumerate(ways) if any(p.way == way for p in points)]
    if floors:
        level = sum(floors) / len(floors)
        line = Series([x.low, x.high], [level, level], MUTED, "real images against real images", width=1, dash="dash")
        series.insert(0, line)
    label = metric_label(points[0].metric)
    if min([p.value for p in points]) > 0:
        return Panel(x, log_axis(label, [*ends, *floors]), tuple(series))
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    return Panel(x, Axis(label, min(ends) - room, max(ends) + room, log=False), tuple(series))


def _line(points: Sequence[CallPoint], way: str, number: int) -> Series:
    own = sorted((p for p in points if p.way == way), key=lambda p: p.num_calls)
    errors = [p.stderr or 0.0 for p in own]
    return Series(
        [float(p.num_calls) for p in own], [p.value for p in own], category_colour(number), way, width=1.3,
        marker=_MARKERS[number % len(_MARKERS)], error=(errors, errors) if any(errors) else None,
        hover=[(p.way, f"{p.num_calls} calls", f"{p.value:.4g}") for p in own],
    )  # fmt: skip
