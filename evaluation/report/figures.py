"""Charts for print: matplotlib figures, as PNG, SVG or PDF."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from data_pipeline.files import write_atomic
from evaluation.report.chart import Axis, Chart, LegendOf, Panel, Series, wrapped
from evaluation.report.law_chart import law_chart
from evaluation.report.palette import GRID, INK, MUTED
from evaluation.report.ticks import linear_ticks, percent, power_ticks, scientific, value_ticks
from evaluation.scaling.law import Law

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "mathtext.default": "regular",
    "savefig.dpi": 200,
    "svg.fonttype": "none",
}
_MARKERS = {"dot": "o", "ring": "o", "square": "s", "diamond": "D", "cross": "x"}
_HOLLOW = ("ring", "square")
_DASHES: Any = {"solid": "-", "dash": (0, (4, 3)), "dot": (0, (1, 2))}


def draw(chart: Chart) -> Figure:
    """A chart on paper. What is hidden on the screen until it is chosen stands in the legend only."""
    with rc_context(STYLE):
        figure = Figure(figsize=chart.size, layout="constrained")
        FigureCanvasAgg(figure)
        columns = max(len(row) for row in chart.rows)
        grid = figure.subplots(len(chart.rows), columns, squeeze=False, height_ratios=chart.heights)
        for row, line in zip(chart.rows, grid, strict=True):
            for panel, axes in zip(row, line, strict=False):
                _draw_panel(axes, panel)
            for axes in line[len(row) :]:
                axes.set_axis_off()
        if chart.title:
            figure.suptitle(_plain(chart.title), x=0.01, ha="left", fontsize=11, color=INK)
        figure.align_ylabels()
        _legend(figure, chart, "sizes")
        _legend(figure, chart, "laws")
        return figure


def draw_law(law: Law, *, title: str | None = None, paper: bool = False) -> Figure:
    """The law's chart on paper."""
    return draw(law_chart(law, title=title, paper=paper))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's suffix names (.png, .svg, .pdf), atomically."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=200)
    write_atomic(path, buffer.getvalue())


def _draw_panel(axes: Axes, panel: Panel) -> None:
    _set_axis(axes, "x", panel.x)
    _set_axis(axes, "y", panel.y)
    axes.grid(which="major", color=GRID, lw=0.6, zorder=0)
    axes.set_axisbelow(True)
    if panel.title:
        axes.set_title(_plain(panel.title), loc="left", fontsize=9.5, color=INK)
    for band in panel.bands:
        axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.13, lw=0, zorder=1)
    for order, series in enumerate(panel.series):
        if series.shown == "yes":
            _draw_series(axes, series, zorder=2 + order / len(panel.series))
    if panel.message:
        axes.text(0.02, 0.04, _plain(panel.message), transform=axes.transAxes, fontsize=8.5, color=MUTED, wrap=True)


def _draw_series(axes: Axes, series: Series, *, zorder: float) -> None:
    look = _look(series) | {"zorder": zorder}
    if series.error is None:
        axes.plot(series.x, series.y, **look)
        return
    below, above = (np.asarray(part, dtype=float) for part in series.error)
    y = np.asarray(series.y, dtype=float)
    if axes.get_yscale() == "log":
        below = np.minimum(below, 0.9 * y)  # a bar that would reach 0 has no end on a log axis
    axes.errorbar(series.x, y, yerr=[below, above], ecolor=series.colour, elinewidth=1.0, capsize=2, **look)


def _look(series: Series) -> dict[str, Any]:
    """How a line and its markers look, in matplotlib's words."""
    look: dict[str, Any] = {
        "color": series.colour, "lw": series.width, "alpha": series.opacity, "solid_capstyle": "round",
        "ls": _DASHES[series.dash] if series.width else "none",
    }  # fmt: skip
    if series.marker is not None:
        look |= {"marker": _MARKERS[series.marker], "ms": series.size}
        look |= {"mfc": "none", "mew": 1.1} if series.marker in _HOLLOW else {}
    return look


def _set_axis(axes: Axes, name: str, axis: Axis) -> None:
    getattr(axes, f"set_{name}scale")("log" if axis.log else "linear")
    getattr(axes, f"set_{name}lim")(axis.low, axis.high)
    ticks, text = _ticks(axis)
    drawn = getattr(axes, f"{name}axis")
    drawn.set_major_locator(FixedLocator(list(ticks)))
    drawn.set_minor_locator(NullLocator())
    drawn.set_major_formatter(FuncFormatter(lambda value, _: text(value)) if axis.label else NullFormatter())
    getattr(axes, f"set_{name}label")(_plain(axis.label))


def _ticks(axis: Axis) -> tuple[Sequence[float], Callable[[float], str]]:
    if axis.ticks == "power":
        return power_ticks(axis.low, axis.high), scientific
    ticks = value_ticks(axis.low, axis.high) if axis.log else linear_ticks(axis.low, axis.high)
    return ticks, percent if axis.ticks == "percent" else (lambda v: f"{v:g}")


def _legend(figure: Figure, chart: Chart, which: LegendOf) -> None:
    """Sizes stand to the right of the panels, everything else below them."""
    series = [s for panel in chart.panels for s in panel.series if s.legend == which and s.shown != "offered"]
    named = {s.label: s for s in series if s.label}
    if not named:
        return
    handles = [
        Line2D([], [], label=_plain(wrapped(label)), **(_look(s) if s.shown == "yes" else {"ls": "none"}))
        for label, s in named.items()
    ]
    if which == "sizes":
        figure.legend(
            handles=handles, title=chart.sizes_title, loc="outside right upper", fontsize=8.5, title_fontsize=8.5
        )
    else:
        figure.legend(handles=handles, loc="outside lower left", fontsize=8, markerscale=0.8, labelspacing=0.4)


def _plain(text: str) -> str:
    """Text in which a dollar is a dollar."""
    return text.replace("$", r"\$")
