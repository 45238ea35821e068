"""Charts for the screen: plotly figures with the same content, that can be zoomed and say what a point is."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from evaluation.report.chart import Axis, Band, Chart, Panel, Series, wrapped
from evaluation.report.palette import GRID, INK, MUTED
from evaluation.report.ticks import power_ticks, scientific

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_PIXELS_PER_INCH = 108
_SYMBOLS = {"dot": "circle", "ring": "circle-open", "square": "square-open", "diamond": "diamond", "cross": "x-thin"}
_LEGENDS = {"sizes": "legend", "laws": "legend2"}
_LAW_LINE = 19  # pixels a line of the legend below


def plotly_figure(chart: Chart) -> go.Figure:
    """A chart as a plotly figure, which `write_html`, `mlflow.log_figure` and notebooks take."""
    columns = max(len(row) for row in chart.rows)
    padded = [[*row, *[None] * (columns - len(row))] for row in chart.rows]
    figure = make_subplots(
        len(chart.rows), columns, shared_xaxes=len(chart.rows) > 1, row_heights=list(chart.heights),
        vertical_spacing=0.06 if len(chart.rows) > 1 else 0.0, horizontal_spacing=0.07,
        subplot_titles=[html.escape(p.title) if p else "" for row in padded for p in row],
        specs=[[{} if p else None for p in row] for row in padded],
    )  # fmt: skip
    named: set[str] = set()
    for i, row in enumerate(chart.rows, start=1):
        for j, panel in enumerate(row, start=1):
            _draw_panel(figure, panel, i, j, named)
    labels = {s.label for panel in chart.panels for s in panel.series if s.label and s.legend == "laws"}
    _lay_out(figure, chart, sum(1 + wrapped(label).count("\n") for label in labels))
    return figure


def _draw_panel(figure: go.Figure, panel: Panel, row: int, col: int, named: set[str]) -> None:
    """`named` collects the labels that the legends have already."""
    for band in panel.bands:
        figure.add_trace(_band(band), row=row, col=col)
    for series in panel.series:
        figure.add_trace(_trace(series, show=bool(series.label) and series.label not in named), row=row, col=col)
        named.add(series.label)
    figure.update_xaxes(_axis(panel.x), row=row, col=col)
    figure.update_yaxes(_axis(panel.y), row=row, col=col)
    if panel.message:
        figure.add_annotation(
            text=html.escape(panel.message), xref="x domain", yref="y domain", x=0.02, y=0.04, showarrow=False,
            xanchor="left", font={"color": MUTED, "size": 12}, row=row, col=col,
        )  # fmt: skip


def _trace(series: Series, *, show: bool) -> go.Scatter:
    name = html.escape(wrapped(series.label)).replace("\n", "<br>")
    parts = [*(["lines"] if series.width else []), *(["markers"] if series.marker else [])]
    trace: dict[str, Any] = {
        "x": _numbers(series.x), "y": _numbers(series.y), "mode": "+".join(parts) or "none",
        "name": name, "showlegend": show, "legend": _LEGENDS[series.legend],
        "legendgroup": series.group or series.label or None, "opacity": series.opacity,
        "line": {"color": series.colour, "width": 1.25 * series.width, "dash": series.dash},
        "visible": True if series.shown == "yes" else "legendonly", "connectgaps": False,
    }  # fmt: skip
    if series.marker:
        hollow = series.marker in ("ring", "square", "cross")
        edge = {"width": 1.6, "color": series.colour} if hollow else {"width": 0}
        symbol = _SYMBOLS[series.marker]
        trace["marker"] = {"color": series.colour, "size": 1.45 * series.size, "symbol": symbol, "line": edge}
    if series.error is not None:
        below, above = series.error
        trace["error_y"] = {
            "type": "data", "symmetric": False, "array": _numbers(above), "arrayminus": _numbers(below),
            "thickness": 1.1, "width": 2, "color": series.colour,
        }  # fmt: skip
    if series.hover:
        trace["text"] = ["<br>".join(html.escape(line) for line in lines) for lines in series.hover]
        trace["hovertemplate"] = "%{text}<extra></extra>"
    else:
        trace["hoverinfo"] = "skip"
    return go.Scatter(trace)


def _band(band: Band) -> go.Scatter:
    return go.Scatter(
        x=_numbers([*band.x, *reversed(band.x)]), y=_numbers([*band.low, *reversed(band.high)]), fill="toself",
        fillcolor=_faint(band.colour), line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False,
        legendgroup=band.group or None,
    )  # fmt: skip


def _axis(axis: Axis) -> dict[str, Any]:
    low, high = (math.log10(axis.low), math.log10(axis.high)) if axis.log else (axis.low, axis.high)
    look: dict[str, Any] = {
        "type": "log" if axis.log else "linear", "range": [low, high], "showticklabels": bool(axis.label),
        "title": {"text": html.escape(axis.label), "standoff": 8}, "gridcolor": GRID, "zeroline": False,
        "showline": True, "linecolor": MUTED, "ticks": "outside", "tickcolor": MUTED, "ticklen": 4,
    }  # fmt: skip
    if axis.ticks == "percent":
        look |= {"tickformat": "+.2~%"}
    elif axis.ticks == "value":
        look |= {"tickformat": "~g"}
    elif high - low > 1.6:
        look |= {"exponentformat": "power", "dtick": 1}
        look["minor"] = {"ticks": "outside", "dtick": "D1", "ticklen": 2, "tickcolor": GRID}
    else:  # less than a decade or so: what lies beyond is for those who zoom out
        ticks = power_ticks(axis.low, axis.high) or [axis.low]
        more = [m * 10.0**d for d in range(round(low) - 3, round(high) + 4) for m in (1, 2, 5)]
        values = sorted({float(f"{v:.3g}") for v in (*ticks, *more)})
        look |= {"tickmode": "array", "tickvals": values, "ticktext": [scientific(v) for v in values]}
    return look


def _lay_out(figure: go.Figure, chart: Chart, num_lines: int) -> None:
    below = 52 + _LAW_LINE * num_lines
    top = 60 if any(panel.title for panel in chart.panels) else 40
    height = round(chart.size[1] * _PIXELS_PER_INCH) + below
    figure.update_layout(
        title={"text": html.escape(chart.title), "x": 0, "xref": "container", "font": {"size": 15}, "pad": {"l": 10}},
        template="none", height=height, margin={"l": 72, "r": 20, "t": top, "b": 52}, hovermode="closest",
        hoverlabel={"bgcolor": "#ffffff", "font": {"family": FONT, "color": INK}},
        font={"family": FONT, "size": 12.5, "color": INK}, paper_bgcolor="#ffffff", plot_bgcolor="#ffffff",
        legend={"title": {"text": chart.sizes_title}, "x": 1.01, "y": 1, "tracegroupgap": 2},
        legend2={
            "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom", "tracegroupgap": 0,
            "bgcolor": "rgba(0,0,0,0)",
        },
    )  # fmt: skip


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Numbers to seven digits, which no screen tells apart; a gap is null, which is what JSON has."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.13)"
