"""The figure of a classifier of noisy images: how often it is right against t."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.report.figures import STYLE
from evaluation.report.palette import GRID

_CURVES = {"accuracy": ("first guess", "#21918c"), "top5": ("among five", "#3b528b")}


def draw_accuracy(by_t: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Accuracy in ranges of t, with bars of one standard error; `by_t` as `evaluation.accuracy` makes it."""
    middle = (by_t["edges"][:-1] + by_t["edges"][1:] - 1) / 2
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(which="major", color=GRID, lw=0.6, zorder=0)
        axes.set_axisbelow(True)
        for name, (label, colour) in _CURVES.items():
            if name in by_t:
                error = np.nan_to_num(by_t[f"{name}_stderr"])
                axes.errorbar(
                    middle, by_t[name], yerr=error, fmt="o-", ms=4, lw=1.3, capsize=2, color=colour, label=label
                )
        axes.set_xlim(0, by_t["edges"][-1])
        axes.set_ylim(0, 1)
        axes.set_xlabel("timestep t")
        axes.set_ylabel("share of images whose class is named")
        axes.legend()
    return figure
