"""Figures of a likelihood estimate: the bound by timestep, and the rate-distortion curve. Static, for print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from evaluation.nll.profile import Profile
from evaluation.report.figures import STYLE

CURVE = "#21918c"


def draw_per_t(by_t: Profile) -> Figure:
    """L_t in bits/dim a step over t, both log, with bars of one standard error; the axis is t + 1, for t = 0."""
    with _figure() as (figure, axes):
        kept = by_t.bits > 0
        x, y, error = by_t.centre[kept] + 1, by_t.bits[kept], np.nan_to_num(by_t.bits_stderr[kept])
        axes.set_xscale("log")
        axes.set_yscale("log")
        low = np.minimum(error, 0.9 * y)  # a bar that would reach 0 has no end on a log axis
        few = len(x) <= 64
        axes.errorbar(
            x, y, yerr=[low, error], fmt="o-" if few else "-", ms=4, lw=1.3, color=CURVE, ecolor=CURVE,
            elinewidth=0.9 if few else 0.4, capsize=2 if few else 0,
        )  # fmt: skip
        _mark_timesteps(axes, int(by_t.edges[-1]))
        axes.set_xlabel("timestep t")
        axes.set_ylabel("$L_t$, bits/dim a step")
    return figure


def draw_rate_distortion(by_t: Profile) -> Figure:
    """Distortion of the guessed x_0 against the bits received so far, as in Ho et al. 2020, figure 5."""
    with _figure() as (figure, axes):
        few = len(by_t.rate) <= 64
        axes.plot(by_t.rate, by_t.distortion, "o-" if few else "-", ms=4, lw=1.3, color=CURVE)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rate (bits/dim)")
        axes.set_ylabel("distortion (RMSE of the predicted $x_0$, 0 to 255)")
    return figure


@contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(which="major", color="#e6e6e6", lw=0.6, zorder=0)
        axes.set_axisbelow(True)
        yield figure, axes


def _mark_timesteps(axes: Axes, num_timesteps: int) -> None:
    """Ticks at t = 0, 1, 3, 10, 30 ... on an axis of t + 1."""
    decades = range(int(np.log10(num_timesteps)) + 1)
    marks = [0, *(m * 10**d for d in decades for m in (1, 3) if m * 10**d < num_timesteps)]
    axes.xaxis.set_major_locator(FixedLocator([mark + 1 for mark in marks]))
    axes.xaxis.set_major_formatter(FixedFormatter([str(mark) for mark in marks]))
    axes.xaxis.set_minor_locator(NullLocator())
