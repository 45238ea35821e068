"""Rows of images with words at their heads and sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.report.figures import STYLE
from evaluation.report.palette import INK, MUTED

CELL = 0.95  # inches an image


def draw_rows(
    images: NDArray[np.uint8], *, heads: Sequence[str] = (), sides: Sequence[str] = (), title: str = "",
    marked: Sequence[int] = (),
) -> Figure:  # fmt: skip
    """A picture of rows of images.

    Args:
        images: [rows, columns, H, W, 3].
        heads: [columns] or none, what stands above the first row.
        sides: [rows] or none, what stands to the left.
        marked: columns of real images, which get a frame.
    """
    rows, columns = images.shape[:2]
    with rc_context(STYLE):
        figure = Figure(figsize=(CELL * columns + (0.9 if sides else 0.2), 1.04 * CELL * rows + 0.6))
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        grid = figure.subplots(rows, columns, squeeze=False)
        for row, line in enumerate(grid):
            for column, axes in enumerate(line):
                _show(axes, images[row, column], framed=column in marked)
            if sides:
                line[0].set_ylabel(sides[row], fontsize=8, color=MUTED, rotation=0, ha="right", va="center")
        for axes, head in zip(grid[0], heads, strict=False):
            axes.set_title(head, fontsize=8, color=MUTED)
        if title:
            figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10, color=INK)
        return figure


def _show(axes: Axes, image: NDArray[np.uint8], *, framed: bool) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(framed)
        spine.set_color(INK)
        spine.set_linewidth(1.5)
