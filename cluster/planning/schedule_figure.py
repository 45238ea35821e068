"""A schedule on paper: nodes as rows, a trial's bar as high as its devices, evaluations thin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cluster.planning.gantt import Bar, bars, devices
from cluster.scheduling.jobs import Resources
from cluster.scheduling.simulate import Schedule
from evaluation.report.figures import STYLE
from evaluation.report.palette import GRID, INK, MUTED

_WIDTH, _LOWEST, _HIGHEST = 10.0, 2.2, 9.0  # inches
_GAP = 0.35  # between nodes, in devices of a node that has few, ...
_GAP_SHARE = 0.12  # ... or of the node's height
_THIN = 0.5  # an evaluation's height, of its devices
_MOST_NAMES = 32  # of nodes on the axis
_CHARACTER = 0.062  # inches a character of a label takes
_LABEL_HEIGHT = 0.11  # inches
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class Look:
    """How a trial is drawn."""

    size: str  # for the legend
    label: str  # in its bar
    colour: str


def draw_schedule(
    schedule: Schedule, nodes: Mapping[str, Resources], looks: Mapping[str, Look], *, title: str
) -> Figure:  # fmt: skip
    """The schedule's figure; `looks` by trial name."""
    heights = {node: devices(has) for node, has in nodes.items()}
    gap = max(_GAP, _GAP_SHARE * max(heights.values()))
    floors, total = {}, 0.0
    for node, height in heights.items():
        floors[node], total = total, total + height + gap
    total -= gap
    drawn = bars(schedule, nodes)
    unit, seconds = next((u for u in _UNITS if schedule.makespan >= 2 * u[1]), _UNITS[-1])
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, _height(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_xlim(0, 1.01 * schedule.makespan / seconds)
        axes.set_ylim(total + 0.2 * gap, -0.2 * gap)  # the first node on top
        for node, height in heights.items():
            axes.axhspan(floors[node], floors[node] + height, color=GRID, alpha=0.45, lw=0, zorder=0)
        device = 72 * 0.85 * _height(heights) / (total + 0.4 * gap)  # points high
        _draw_bars(axes, drawn, floors, heights, looks, seconds, line=min(0.6, 0.1 * device))
        _mark_bound(axes, schedule, seconds)
        _name_nodes(axes, nodes, floors, heights)
        axes.set_xlabel(f"time from the start ({unit})")
        axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        _legend(figure, drawn, looks)
        figure.draw_without_rendering()  # the axes' size in inches, which the labels must fit into
        _label(axes, drawn, floors, heights, looks, seconds)
        return figure


def _height(heights: Mapping[str, float]) -> float:
    rows = sum(0.25 * min(height, 4.0) + 0.05 * min(max(height - 4.0, 0.0), 4.0) for height in heights.values())
    return float(np.clip(1.3 + rows, _LOWEST, _HIGHEST))


def _draw_bars(
    axes: Axes, drawn: Iterable[Bar], floors: Mapping[str, float], heights: Mapping[str, float],
    looks: Mapping[str, Look], seconds: float, *, line: float,
) -> None:  # fmt: skip
    """`line`: width of the edges in points, thin where bars are thousands, which keep their colours so."""
    boxes, colours, edges = [], [], []
    for bar in sorted(drawn, key=lambda bar: bar.span.kind != "trial"):  # evaluations over trials
        left, right = bar.span.start / seconds, bar.span.end / seconds
        bottom, top = _extent(bar, floors, heights)
        boxes.append([(left, bottom), (left, top), (right, top), (right, bottom)])
        colours.append(looks[bar.trial].colour)
        edges.append("white" if bar.span.kind == "trial" else looks[bar.trial].colour)
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors=edges, linewidths=line, zorder=2))


def _extent(bar: Bar, floors: Mapping[str, float], heights: Mapping[str, float]) -> tuple[float, float]:
    """From where to where a bar reaches; the first device of a node is at the bottom of its row."""
    floor = floors[bar.span.node] + heights[bar.span.node]
    if bar.span.kind == "trial":
        return floor - bar.top, floor - bar.bottom
    middle, half = floor - (bar.bottom + bar.top) / 2, max(_THIN * (bar.top - bar.bottom), 0.1) / 2
    return middle - half, middle + half


def _mark_bound(axes: Axes, schedule: Schedule, seconds: float) -> None:
    axes.axvline(schedule.bound / seconds, color=INK, lw=1.0, ls=(0, (4, 3)), zorder=3)


def _name_nodes(
    axes: Axes, nodes: Mapping[str, Resources], floors: Mapping[str, float], heights: Mapping[str, float]
) -> None:  # fmt: skip
    every = -(-len(nodes) // _MOST_NAMES)
    shown = list(nodes)[::every]
    names = [f"{node}\n{nodes[node]}" if len(nodes) <= 8 else node for node in shown]
    axes.set_yticks([floors[node] + heights[node] / 2 for node in shown], names)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.spines["left"].set_visible(False)


def _label(
    axes: Axes, drawn: Sequence[Bar], floors: Mapping[str, float], heights: Mapping[str, float],
    looks: Mapping[str, Look], seconds: float,
) -> None:  # fmt: skip
    """A trial's name in its bar, where there is room for it."""
    box = axes.get_window_extent().transformed(axes.figure.dpi_scale_trans.inverted())
    across, up = box.width / np.ptp(axes.get_xlim()), box.height / np.ptp(axes.get_ylim())
    for bar in drawn:
        look, length = looks[bar.trial], (bar.span.end - bar.span.start) / seconds
        bottom, top = _extent(bar, floors, heights)
        if bar.span.kind != "trial" or (top - bottom) * up < _LABEL_HEIGHT:
            continue
        if length * across > _CHARACTER * len(look.label) + 0.1:
            dark = float(np.dot(to_rgb(look.colour), (0.299, 0.587, 0.114))) < 0.55
            axes.text(
                (bar.span.start + bar.span.end) / 2 / seconds, (bottom + top) / 2, look.label.replace("$", r"\$"),
                ha="center", va="center", fontsize=8, color="white" if dark else INK, zorder=4,
            )  # fmt: skip


def _legend(figure: Figure, drawn: Iterable[Bar], looks: Mapping[str, Look]) -> None:
    sizes = {look.size: look.colour for look in looks.values()}
    handles: list[Patch] = [Patch(color=colour, label=size.replace("$", r"\$")) for size, colour in sizes.items()]
    if any(bar.span.kind == "evaluation" for bar in drawn):
        handles.append(Patch(facecolor="none", edgecolor="none", label="thin: evaluations"))
    handles.append(Patch(facecolor="none", edgecolor="none", label="dashed: no schedule\nends earlier"))
    figure.legend(handles=handles[:40], loc="outside right upper", fontsize=8.5, handlelength=1.1, labelcolor=MUTED)
