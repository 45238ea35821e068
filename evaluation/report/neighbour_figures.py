"""Samples beside their nearest training images."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.report.palette import INK, MUTED

CELL = 0.95  # inches a picture
GAP = 0.35  # of a picture, between a sample and its neighbours


def draw_neighbours(images: NDArray[np.uint8], distance: NDArray[np.float64]) -> Figure:
    """A row for each sample.

    Args:
        images: [k, 1 + num, H, W, 3], the sample first.
        distance: [k, num].
    """
    k, columns = images.shape[:2]
    figure = Figure(figsize=(CELL * (columns + GAP) + 0.2, 1.16 * CELL * k + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    widths = [1.0, GAP, *[1.0] * (columns - 1)]
    grid = figure.add_gridspec(k, columns + 1, width_ratios=widths)
    for row in range(k):
        for column in range(columns):
            axes = figure.add_subplot(grid[row, column + (column > 0)])
            _show(axes, images[row, column])
            if column:
                axes.set_xlabel(f"{distance[row, column - 1]:.4g}", fontsize=7, color=MUTED, labelpad=2)
            if row == 0 and column < 2:
                axes.set_title(("sample", "nearest in training")[column], loc="left", fontsize=8, color=INK)
    return figure


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
