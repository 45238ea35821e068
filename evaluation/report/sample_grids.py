"""Samples along compute: for each size the grids that its first run drew, in order."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from evaluation.report.figures import STYLE
from evaluation.report.palette import INK, MUTED
from evaluation.report.run_files import RunRecords
from evaluation.report.style import size_label
from evaluation.report.ticks import scientific

MAX_GRIDS = 8  # of a strip; of more, evenly chosen ones with the last
MAX_STRIPS = 8
PIXELS = 180  # of a grid's longer side in the report
_QUALITY = 78
_T = TypeVar("_T")


@dataclass(frozen=True)
class Grid:
    """One picture of samples."""

    path: Path
    images: int  # seen in training
    compute: float  # FLOPs

    @property
    def label(self) -> str:
        return f"{self.images:,} images\n{_rounded(self.compute)} FLOPs"


@dataclass(frozen=True)
class Strip:
    """The grids of one run."""

    label: str
    grids: tuple[Grid, ...]  # by compute


def sample_strips(runs: Sequence[RunRecords]) -> list[Strip]:
    """A strip for each size, of its run with the lowest seed that has grids; small sizes first."""
    strips: dict[int, Strip] = {}
    for run in sorted(runs, key=lambda r: (r.run.num_params, r.run.seed, r.run.name)):
        paths = [path for path in sorted((run.run.folder / "samples").glob("*.png")) if path.stem.isdigit()]
        if run.run.num_params in strips or not paths or not run.records:
            continue
        grids = [Grid(path, int(path.stem), int(path.stem) * run.flops_per_image) for path in _some(paths, MAX_GRIDS)]
        strips[run.run.num_params] = Strip(size_label(run.run.num_params), tuple(grids))
    return _some(list(strips.values()), MAX_STRIPS)


def draw_samples(strips: Sequence[Strip], *, title: str = "") -> Figure:
    """All strips as one picture, a row a size."""
    columns = max(len(strip.grids) for strip in strips)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 1.35 * columns, 0.5 + 1.75 * len(strips)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(strips), columns, squeeze=False)
        for line, strip in zip(axes, strips, strict=True):
            for place in line:
                place.set_axis_off()
            for place, grid in zip(line, strip.grids, strict=False):
                place.imshow(np.asarray(_open(grid.path)), interpolation="nearest")
                place.set_title(grid.label, fontsize=6.5, color=MUTED)
            line[0].text(
                -0.08, 0.5, strip.label, transform=line[0].transAxes, rotation=90, ha="right", va="center", color=INK
            )
        if title:
            figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=11, color=INK)
        return figure


def data_uri(path: Path) -> str:
    """A grid as a small JPEG within an address, for a page that must need no other file."""
    picture = _open(path)
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        opened: Image.Image = picture.convert("RGB")
    return opened


def _some(items: Sequence[_T], most: int) -> list[_T]:
    """At most so many of them, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _rounded(value: float) -> str:
    """Two digits: 5.8×10¹⁰."""
    return scientific(float(f"{value:.2g}"))
