"""The scaling figure: every run's curve, the compute frontier, the fitted law with its band. Static, for print."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from data_pipeline.files import write_atomic
from evaluation.report.style import metric_label, size_label, split_label
from evaluation.scaling.fits import Curve
from evaluation.scaling.law import Law, LawFit
from evaluation.scaling.points import Point

INK, MUTED = "#1a1a1a", "#6b6b6b"
POWER, CONSTANT = "#c0392b", "#d98200"  # neither is in the sizes' palette
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


def draw_law(law: Law, *, title: str = "") -> Figure:
    """Value against training compute on log-log axes.

    Curves are coloured by model size, with bars of one standard error; frontier points are ringed; points left out of
    every fit (too early) are faint. The fitted laws are drawn over the frontier and dashed beyond it; the form that
    fits better is drawn stronger, with its bootstrap band. Frontier points that a fit on the lower two thirds of
    compute had to predict stand in a square.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        _set_axes(axes, law)  # before anything is drawn: the limits then stay as they are
        sizes = sorted({p.num_params for p in law.frontier.candidates})
        colours = dict(zip(sizes, _colours(len(sizes)), strict=True))
        _draw_runs(axes, law, colours)
        _draw_frontier(axes, law)
        _draw_fits(axes, law)
        if title:
            axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
        _legends(axes, law, colours)
        return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's suffix names (.png, .svg, .pdf), atomically."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=200)
    write_atomic(path, buffer.getvalue())


def _colours(num: int) -> list[str]:
    """An ordered palette: small sizes light, large sizes dark."""
    return [to_hex(colour) for colour in colormaps["viridis_r"](np.linspace(0.18, 0.95, num))]


def _draw_runs(axes: Axes, law: Law, colours: dict[int, str]) -> None:
    for points in _by_run(law.frontier.candidates).values():
        x, y = [p.compute for p in points], [p.value for p in points]
        colour = colours[points[0].num_params]
        axes.plot(x, y, color=colour, lw=1.3, zorder=2, solid_capstyle="round")
        axes.errorbar(
            x, y, yerr=[p.stderr or 0.0 for p in points],
            fmt="o", ms=4.5, color=colour, ecolor=colour, elinewidth=1.0, capsize=2, zorder=3,
        )  # fmt: skip
        early = [e.point for e in law.frontier.exclusions if e.point.run == points[0].run and _drawable(e.point)]
        early = sorted((p for p in early if p.compute < x[0]), key=lambda p: p.compute)
        if early:
            lead = [*early, points[0]]
            axes.plot([p.compute for p in lead], [p.value for p in lead], color=colour, lw=1.0, alpha=0.3, zorder=1)
            axes.plot([p.compute for p in early], [p.value for p in early], "o", ms=3, color=colour, alpha=0.3, mew=0)


def _draw_frontier(axes: Axes, law: Law) -> None:
    points = law.frontier.points
    axes.plot(
        [p.compute for p in points], [p.value for p in points],
        "o", ms=9, mfc="none", mec=INK, mew=1.1, zorder=5, label="frontier",
    )  # fmt: skip
    held_out = law.of("power").hold_out.points
    if held_out:
        axes.plot(
            [h.point.compute for h in held_out], [h.point.value for h in held_out],
            "s", ms=13, mfc="none", mec=INK, mew=0.8, zorder=6, label="frontier, upper third: held out to test the fit",
        )  # fmt: skip


def _draw_fits(axes: Axes, law: Law) -> None:
    drawn = [f for f in law.fits if f.fit.curve is not None and f.fit.status == "ok"]
    best = law.best
    for law_fit in drawn:
        curve = law_fit.fit.curve
        assert curve is not None
        colour, text = (POWER, "power") if law_fit.fit.form == "power" else (CONSTANT, "power + constant")
        width = 1.8 if law_fit is best else 1.1
        low, high = law.frontier.points[0].compute, law.frontier.points[-1].compute
        inside, beyond = np.geomspace(low, high, 100), np.geomspace(high, 3 * high, 40)
        label = _law_text(law_fit, curve, text)
        axes.plot(inside, curve(inside), color=colour, lw=width, zorder=4, label=label)
        axes.plot(beyond, curve(beyond), color=colour, lw=0.8 * width, ls=(0, (4, 3)), zorder=4)
        band = law_fit.uncertainty
        if law_fit is best and band is not None and band.band_compute:
            axes.fill_between(
                band.band_compute, band.band_low, band.band_high, color=colour, alpha=0.13, lw=0, zorder=1
            )


def _law_text(law_fit: LawFit, curve: Curve, name: str) -> str:
    boot = law_fit.uncertainty
    interval = ""
    if boot is not None and "exponent" in boot.intervals:
        few = f" from only {boot.num_runs} runs" if boot.status == "uncalibrated" else ""
        interval = f" [{boot.intervals['exponent'][0]:.3f}, {boot.intervals['exponent'][1]:.3f}{few}]"
    constant = f"c = {curve.constant:.2f}, " if law_fit.fit.form == "power_constant" else ""
    return f"{name}: {constant}exponent −{curve.exponent:.3f}{interval}, R² {law_fit.fit.r2_log:.3f}"


def _set_axes(axes: Axes, law: Law) -> None:
    points = [p for p in (*law.frontier.candidates, *(e.point for e in law.frontier.exclusions)) if _drawable(p)]
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel(f"{metric_label(law.metric)}, {split_label(law.split)}" if law.split else metric_label(law.metric))
    if not points:
        axes.text(0.5, 0.5, "no points to draw", transform=axes.transAxes, ha="center", color=MUTED)
        return
    values = [p.value for p in points] + [p.value + (p.stderr or 0.0) for p in points]
    low, high = min(values), max(values)
    room = (high / low) ** 0.08 if high > low else 1.1
    computes = [p.compute for p in points]
    axes.set_xlim(min(computes) / 1.25, max(computes) * (3.2 if law.has_fit else 1.25))
    axes.set_ylim(low / room**1.4, high * room)
    axes.xaxis.set_major_locator(FixedLocator(compute_ticks(*axes.get_xlim())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(FixedLocator(value_ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="#e6e6e6", lw=0.6, zorder=0)
    axes.set_axisbelow(True)


def _legends(axes: Axes, law: Law, colours: dict[int, str]) -> None:
    sizes = [
        axes.plot([], [], "o-", ms=4.5, lw=1.3, color=colour, label=size_label(size))[0]
        for size, colour in colours.items()
    ]
    first = axes.legend(
        handles=sizes, title="parameters", loc="upper right", fontsize=9, title_fontsize=9, handlelength=1.6
    )
    axes.add_artist(first)
    drawn, labels = axes.get_legend_handles_labels()
    skipped = {handle.get_label() for handle in sizes}
    kept = [(h, text) for h, text in zip(drawn, labels, strict=True) if text not in skipped]
    if not law.has_fit and law.frontier.candidates:
        axes.text(
            0.02,
            0.16,
            f"no law fitted: {law.of('power').fit.message}",
            transform=axes.transAxes,
            fontsize=8.5,
            color=MUTED,
        )
    if kept:
        handles, texts = zip(*kept, strict=True)
        axes.legend(handles, texts, loc="lower left", fontsize=8, markerscale=0.8, labelcolor=INK, labelspacing=0.35)


def value_ticks(low: float, high: float) -> list[float]:
    """Four to nine round ticks for a log axis, also over a narrow range such as 4.2 to 7.6."""
    if high / low > 8:
        for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
            if len(ticks) >= 4:
                return ticks
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    for step in (magnitude, magnitude / 2, magnitude / 4, magnitude / 5, magnitude / 10):
        ticks = [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) >= 4:
            return ticks
    return ticks


def compute_ticks(low: float, high: float) -> list[float]:
    """Ticks at powers of ten, with 3 between them where the range is short."""
    decades = math.log10(high / low)
    mantissas = (1,) if decades > 3.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
    stride = max(1, round(decades / 7))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in powers if d % stride == 0 for m in mantissas if low <= m * 10.0**d <= high]


def scientific(value: float) -> str:
    """10^12, 3 x 10^12 in math text."""
    power = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**power
    return f"$10^{{{power}}}$" if abs(mantissa - 1) < 1e-6 else f"${mantissa:g}{{\\times}}10^{{{power}}}$"


def _by_run(points: tuple[Point, ...]) -> dict[str, list[Point]]:
    runs: dict[str, list[Point]] = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return dict(sorted(runs.items(), key=lambda item: (item[1][0].num_params, item[0])))


def _drawable(point: Point) -> bool:
    return all(math.isfinite(x) and x > 0 for x in (point.value, point.compute))
