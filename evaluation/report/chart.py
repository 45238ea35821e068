"""What a figure shows, as plain data. `figures` draws it for print, `interactive` for the screen."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Marker = Literal["dot", "ring", "square", "diamond", "cross"]
Dash = Literal["solid", "dash", "dot"]
Ticks = Literal["value", "power", "percent"]  # round numbers; powers of ten; signed percentages
Shown = Literal[
    "yes",
    "named",  # not drawn, but named in the legend; on the screen a click there draws it
    "offered",  # on the screen only: named in the legend, drawn at a click
]
LegendOf = Literal["sizes", "laws"]  # which of a figure's two legends names it
LEGEND_WIDTH = 120  # characters


@dataclass(frozen=True)
class Series:
    """Points in order, joined by a line or not. NaN in x breaks the line: one series may hold many runs."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    label: str = ""  # in the legend; empty: not there
    legend: LegendOf = "laws"
    group: str = ""  # on the screen, series of one group are shown and hidden together
    width: float = 0.0  # of the line; 0: none
    dash: Dash = "solid"
    marker: Marker | None = None
    size: float = 4.5  # of the marker, in points
    error: tuple[Sequence[float], Sequence[float]] | None = None  # lengths of the bars below and above
    opacity: float = 1.0
    hover: Sequence[tuple[str, ...]] = ()  # for each point, the lines that the pointer shows
    shown: Shown = "yes"


@dataclass(frozen=True)
class Band:
    """The area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str
    group: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis; without a label its numbers are not written (the panel below has them)."""

    label: str
    low: float
    high: float
    log: bool = True
    ticks: Ticks = "value"


@dataclass(frozen=True)
class Panel:
    """One pair of axes with all that is drawn in it."""

    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    bands: tuple[Band, ...] = ()
    title: str = ""
    message: str = ""  # what a reader must know who sees nothing drawn


@dataclass(frozen=True)
class Chart:
    """A figure: rows of panels. Axes of one column move together."""

    title: str
    rows: tuple[tuple[Panel, ...], ...]
    heights: tuple[float, ...] = (1.0,)  # of the rows, relative
    size: tuple[float, float] = (7.6, 5.0)  # inches
    sizes_title: str = "parameters"

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row)


def log_axis(label: str, values: Sequence[float], *, ticks: Ticks = "value", room: float = 0.06) -> Axis:
    """A log axis around all values that are finite and positive, with this share of room at either end."""
    kept = [v for v in values if math.isfinite(v) and v > 0]
    low, high = (min(kept), max(kept)) if kept else (1.0, 10.0)
    factor = max((high / low) ** room, 1.03)
    if ticks == "power" and high < 3 * low:  # one place only: an axis that says where
        factor = 3.0
    return Axis(label, low / factor, high * factor, ticks=ticks)


def joined(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Several runs' (x, y) as one series with a gap (NaN) after each."""
    pairs = [pair for run in runs for pair in (*run, (math.nan, math.nan))]
    return [x for x, _ in pairs], [y for _, y in pairs]


def wrapped(label: str) -> str:
    """A legend's text in lines that fit under the panels."""
    return textwrap.fill(label, LEGEND_WIDTH)
