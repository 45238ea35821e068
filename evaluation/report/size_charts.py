"""Which size for which budget: isoFLOP parabolas with the best size and its images, and L(N, D) over the points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.report.chart import Axis, Chart, Panel, Series, log_axis
from evaluation.report.law_chart import LEAST_RESIDUAL
from evaluation.report.palette import INK, PAPER, SizeGroup, ordered_colours, size_groups
from evaluation.report.style import law_title, size_label, status_label
from evaluation.report.text_table import Table
from evaluation.report.ticks import scientific
from evaluation.scaling.law import Law
from evaluation.scaling.points import Point
from evaluation.scaling.sizes.isoflop import IsoFlop, OptimumLaw, Slice, isoflop
from evaluation.scaling.sizes.optimum import Interval, Optimum, optimum
from evaluation.scaling.sizes.size_data import SizeDataFit, fit_size_data

FACTORS = (1.0, 10.0, 100.0)  # budgets of the table, beyond the largest compute
_C_LABEL = "training compute (FLOPs)"


@dataclass(frozen=True)
class SizeFindings:
    """What the points say of size and data."""

    title: str  # what the values are
    points: tuple[Point, ...]
    isoflop: IsoFlop
    size_data: SizeDataFit


def size_findings(law: Law, *, num_rounds: int = 500) -> SizeFindings | None:
    """IsoFLOP parabolas and L(N, D) of a law's points; None where they do not say sizes or images."""
    points = law.frontier.admitted
    if not points or any(p.num_params <= 0 or p.images <= 0 for p in points):
        return None
    found = isoflop(points, num_rounds=num_rounds)
    return SizeFindings(law_title(law.metric, law.split), points, found, fit_size_data(points, num_rounds=num_rounds))


def isoflop_chart(found: SizeFindings, *, title: str = "Equal compute: the best size, and its images") -> Chart | None:
    """Value against size at equal compute with parabolas, and their minima against compute; None without slices."""
    slices = found.isoflop.slices
    if not slices:
        return None
    colours = ordered_colours(len(slices))
    series = [s for part, colour in zip(slices, colours, strict=True) for s in _slice_series(part, colour)]
    sizes = [n for part in slices for n in part.sizes]
    values = [v for part in slices for v in part.values]
    doubt = "" if found.isoflop.status == "ok" else found.isoflop.message
    x, y = log_axis("parameters N", sizes, ticks="power"), log_axis(found.title, values)
    panels = [Panel(x, y, tuple(series), title=doubt)]
    if found.isoflop.size_law is not None and found.isoflop.images_law is not None:
        panels.append(_minima_panel(slices, colours, "size", "best size N*", found.isoflop.size_law))
        panels.append(_minima_panel(slices, colours, "images", "best number of images D*", found.isoflop.images_law))
    return Chart(title, (tuple(panels),), size=(4.4 * len(panels) + 2, 4.2), sizes_title="FLOPs")


def size_data_chart(found: SizeFindings, *, title: str = "L(N, D): value by size and images") -> Chart | None:
    """Measured values against images with the fitted L(N, D) of each size through them, and the residuals."""
    curve = found.size_data.curve
    if curve is None:
        return None
    groups = size_groups([p.num_params for p in found.points])
    x = log_axis("images seen in training D", [float(p.images) for p in found.points], ticks="power")
    top: list[Series] = []
    below: list[Series] = [Series([x.low, x.high], [0.0, 0.0], INK, width=0.8)]
    largest = 0.0
    for group in groups:
        own = [p for p in found.points if p.num_params in group.sizes]
        fitted = curve([p.num_params for p in own], [p.images for p in own])
        residuals = [p.value / f - 1 for p, f in zip(own, fitted.tolist(), strict=True)]
        largest = max(largest, *map(abs, residuals))
        top += [_measured(own, [p.value for p in own], group, group.label), *_predicted(found.size_data, own, group)]
        below.append(_measured(own, residuals, group, ""))
    name = f"L(N, D), {status_label(found.size_data.status)}" + (
        f": {found.size_data.message.rstrip('.')}" if found.size_data.message else ""
    )
    top.append(Series([], [], INK, name, width=1.2))
    y = log_axis(found.title, [p.value for p in found.points])
    reach = max(1.15 * largest, LEAST_RESIDUAL)
    return Chart(
        title,
        (
            (Panel(Axis("", x.low, x.high, ticks="power"), y, tuple(top)),),
            (Panel(x, Axis("residual", -reach, reach, log=False, ticks="percent"), tuple(below)),),
        ),
        heights=(3.0, 1.0),
        size=(8.6, 6.0),
    )


def budget_table(found: SizeFindings) -> Table:
    """The best size and images for budgets up to 100 times the largest, by L(N, D)."""
    header = ["budget", "FLOPs", "best size N*", "95 %", "images D*", "95 %", "value", "95 %", "beyond the points"]
    if found.size_data.curve is None:
        return Table(header, [])
    largest = max(p.compute for p in found.points)
    rows = []
    for factor in FACTORS:
        best = optimum(found.size_data, found.points, factor * largest)
        rows.append(
            [
                f"{factor:g}×",
                f"{best.compute:.3g}",
                f"{best.num_params:.3g}",
                _between(best.num_params_interval),
                f"{best.images:.3g}",
                _between(best.images_interval),
                f"{best.value:.4g}",
                _between(best.value_interval),
                ", ".join(f"{name} {by:.3g}×" for name, by in _factors(best).items() if by > 1.005),
            ]
        )
    return Table(header, rows, left=(8,))


def _factors(best: Optimum) -> dict[str, float]:
    return {"compute": best.compute_factor, "size": best.size_factor, "images": best.images_factor}


def _between(ends: Interval | None) -> str:
    return "" if ends is None else f"{ends[0]:.3g} .. {ends[1]:.3g}"


def _slice_series(part: Slice, colour: str) -> Iterator[Series]:
    label = scientific(float(f"{part.budget:.2g}"))
    interpolated = ["interpolated on learning curves"] if part.interpolated else []
    hover = [
        (f"{label} FLOPs", f"{size_label(round(n))}, {d:,.0f} images: {v:.4g}", *interpolated)
        for n, d, v in zip(part.sizes, part.images, part.values, strict=True)
    ]
    yield Series(part.sizes, part.values, colour, label, "sizes", label, marker="dot", hover=hover)
    if part.optimal_size is None or part.optimal_value is None:
        return
    grid = np.geomspace(min(part.sizes), max(part.sizes), 60)
    sure = part.status == "ok"
    yield Series(
        grid.tolist(), part.parabola(grid).tolist(), colour, legend="sizes", group=label, width=1.2,
        dash="solid" if sure else "dot",
    )  # fmt: skip
    words = (f"{label} FLOPs", f"minimum at {part.optimal_size:.4g} parameters: {part.optimal_value:.4g}", part.message)
    yield Series(
        [part.optimal_size], [part.optimal_value], colour, legend="sizes", group=label, marker="cross", size=8,
        hover=[tuple(word for word in words if word)],
    )  # fmt: skip


def _minima_panel(slices: Sequence[Slice], colours: Sequence[str], name: str, label: str, law: OptimumLaw) -> Panel:
    """The minima that are sure, the sizes with intervals, and the law through them."""
    sure = [(s, c) for s, c in zip(slices, colours, strict=True) if s.status == "ok"]
    x = log_axis(_C_LABEL, [s.budget for s, _ in sure], ticks="power", room=0.1)
    series, values = [], []
    for part, colour in sure:
        value = getattr(part, f"optimal_{name}")
        low, high = (name == "size" and part.size_interval) or (value, value)
        values += [value, low, high]
        text = scientific(float(f"{part.budget:.2g}"))
        series.append(
            Series(
                [part.budget], [value], colour, legend="sizes", group=text, marker="dot", size=6,
                error=([value - low], [high - value]) if low < high else None,
                hover=[(f"{text} FLOPs", f"{label}: {value:.4g}")],
            )
        )  # fmt: skip
    grid, interval = np.geomspace(x.low, x.high, 30), law.exponent_interval
    between = "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    text = f"{label} grows as C to the {law.exponent:.3g}{between}"
    series.append(Series(grid.tolist(), law(grid).tolist(), PAPER if name == "size" else INK, text, width=1.2))
    return Panel(x, log_axis(label, values, ticks="power"), tuple(series))


def _measured(own: Sequence[Point], values: Sequence[float], group: SizeGroup, label: str) -> Series:
    hover = [(f"{p.run}, seed {p.seed}", f"{p.images:,} images: {p.value:.5g}") for p in own]
    return Series(
        [float(p.images) for p in own], values, group.colour, label, "sizes", group.label, marker="dot", size=3.5,
        hover=hover,
    )  # fmt: skip


def _predicted(fit: SizeDataFit, own: Sequence[Point], group: SizeGroup) -> Iterator[Series]:
    """L(N, D) at the middle size of a group, over its images."""
    if fit.curve is None:
        return
    size = float(np.exp(np.mean(np.log([p.num_params for p in own]))))
    grid = np.geomspace(min(p.images for p in own), max(p.images for p in own), 60)
    values = fit.curve(size, grid)
    name = f"L(N, D) of {size_label(round(size))}"
    hover = [(name, f"{d:,.0f} images: {v:.4g}") for d, v in zip(grid, values, strict=True)]
    yield Series(
        grid.tolist(), values.tolist(), group.colour, legend="sizes", group=group.label, width=1.3, hover=hover
    )
