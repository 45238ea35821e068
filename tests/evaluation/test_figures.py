"""The law's figure in print: what is drawn, ticks, files."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from scaling_points import curve_points, point, study

from evaluation.report.figures import draw, draw_law, save_figure
from evaluation.report.law_chart import FRONTIER, HELD_OUT, OUTLIER, law_chart
from evaluation.report.palette import form_colour, size_groups
from evaluation.report.ticks import percent, power_ticks, scientific, value_ticks
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.intervals.uncertainty import Prediction
from evaluation.scaling.law import Law, fit_law

QUICK = Settings(num_rounds=50)


@lru_cache(maxsize=1)
def law() -> Law:
    return fit_law(study(num_seeds=2), settings=QUICK)


def lines(axes: Axes) -> list[tuple[list[float], str]]:
    """x without gaps, and the colour, of every line."""
    pairs = [(np.asarray(line.get_xdata(), float), to_hex(line.get_color())) for line in axes.get_lines()]
    return [(x[np.isfinite(x)].tolist(), colour) for x, colour in pairs]


@pytest.mark.parametrize(
    ("low", "high"), [(4.2, 7.6), (4.4, 4.6), (3.0, 12.0), (60, 340), (1, 3000), (3.17, 3.73), (1e-9, 1e9)]
)
def test_value_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = value_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert all(low <= t <= high for t in ticks)
    assert all(len(f"{t:g}") <= 5 for t in ticks)


def test_power_ticks() -> None:
    assert power_ticks(2.5e11, 4e13) == pytest.approx([3e11, 1e12, 3e12, 1e13, 3e13])
    assert power_ticks(1e15, 1e21) == pytest.approx([10.0**d for d in range(15, 22)])
    assert [scientific(v) for v in (1e12, 3e12, 1e-3)] == ["10¹²", "3×10¹²", "10⁻³"]
    assert [percent(v) for v in (0.0, 0.015, -0.015)] == ["0", "+1.5 %", "−1.5 %"]


def test_figure_draws_every_run_the_frontier_the_fits_and_the_held_out_points() -> None:
    axes, residuals = draw_law(law(), title="a study").axes
    assert axes.get_xscale() == axes.get_yscale() == residuals.get_xscale() == "log"
    assert residuals.get_yscale() == "linear"
    assert residuals.get_xlabel() == "training compute (FLOPs)"
    assert axes.get_xlim() == residuals.get_xlim()
    assert axes.get_ylabel() == "NLL (bits/dim), held-out images"
    drawn = lines(axes)
    for group in size_groups([p.num_params for p in law().frontier.candidates]):
        runs = sorted((p.run, p.compute) for p in law().frontier.candidates if p.num_params in group.sizes)
        assert ([compute for _, compute in runs], group.colour) in drawn
    assert [p.compute for p in law().frontier.points] in [x for x, _ in drawn]
    low, high = axes.get_ylim()
    assert all(low < p.value < high for p in law().frontier.candidates)


def test_legends_name_sizes_and_laws() -> None:
    sizes, laws = draw_law(law()).legends
    assert [text.get_text() for text in sizes.get_texts()] == ["420 k", "940 k", "1.68 M", "3.7 M"]
    texts = [text.get_text() for text in laws.get_texts()]
    assert {FRONTIER, HELD_OUT} <= set(texts)
    assert any(text.startswith("power + constant: exponent") and "constant" in text for text in texts)


def test_the_best_law_lies_over_its_band_and_goes_on_dashed() -> None:
    best = law().best
    assert best is not None
    assert best.uncertainty is not None
    axes = draw_law(law()).axes[0]
    colour = form_colour(best.fit.form)
    own = [line for line in axes.get_lines() if to_hex(line.get_color()) == colour]
    ends: dict[str, tuple[float, float]] = {}
    for line in own:  # the curve is drawn before the bars of what it predicts
        ends.setdefault(str(line.get_linestyle()), (min(line.get_xdata()), max(line.get_xdata())))
    low, high = law().frontier.points[0].compute, law().frontier.points[-1].compute
    assert ends["-"] == pytest.approx((low, high))
    assert ends["--"] == pytest.approx((high, 100 * high))
    (band,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    assert to_hex(band.get_facecolor()[0]) == colour
    assert band.get_paths()[0].vertices[:, 0].max() == pytest.approx(best.uncertainty.band_compute[-1])


def test_residuals_are_relative_to_the_best_fit() -> None:
    best = law().best
    assert best is not None
    assert best.fit.curve is not None
    residuals = law_chart(law()).rows[1][0]
    found = {x: y for s in residuals.series if s.marker for x, y in zip(s.x, s.y, strict=True)}
    wanted = {p.compute: p.value / float(best.fit.curve(p.compute)) - 1 for p in law().frontier.points}
    assert found == pytest.approx(wanted)
    assert all(s.error is not None for s in residuals.series if s.marker)


def test_predictions_are_drawn_with_their_intervals_and_doubts() -> None:
    best = law().best
    assert best is not None
    assert best.uncertainty is not None
    high = law().frontier.points[-1].compute
    predictions = (Prediction(10 * high, 10, 3.4, 3.3, 3.6), Prediction(100 * high, 100, 3.2, None, None))
    found = dataclasses.replace(best.uncertainty, predictions=predictions, status="uncalibrated")
    fits = tuple(dataclasses.replace(f, uncertainty=found) if f is best else f for f in law().fits)
    chart = law_chart(dataclasses.replace(law(), fits=fits))
    (series,) = [s for s in chart.panels[0].series if s.marker == "diamond"]
    assert "10× and 100×" in series.label
    assert "uncalibrated" in series.label
    bar = chart.panels[0].series[chart.panels[0].series.index(series) - 1]
    assert [*zip(bar.x, bar.y, strict=True)][:2] == [(10 * high, 3.3), (10 * high, 3.6)]
    assert len(bar.x) == 3  # one bar, and the gap behind it
    assert chart.panels[0].x.high > 100 * high
    draw(chart)


def test_a_law_that_is_not_determined_is_named_and_not_drawn() -> None:
    power, constant, broken = law().fits
    fit = dataclasses.replace(constant.fit, status="unidentified", message="any constant fits.")
    doubtful = dataclasses.replace(law(), fits=(power, dataclasses.replace(constant, fit=fit), broken))
    figure = draw_law(doubtful)
    assert form_colour("power_constant") not in {colour for _, colour in lines(figure.axes[0])}
    texts = [text.get_text() for text in figure.legends[1].get_texts()]
    assert "power + constant: unidentified, not drawn (any constant fits)" in texts


def test_points_that_do_not_belong_to_the_others_are_crossed() -> None:
    power, *others = law().fits
    fit = dataclasses.replace(power.fit, status="outliers", message="one point.", outliers=(2,))
    chart = law_chart(dataclasses.replace(law(), fits=(dataclasses.replace(power, fit=fit), *others)))
    (crosses,) = [s for s in chart.panels[0].series if s.label == OUTLIER]
    assert (crosses.x, crosses.y) == ([law().frontier.points[2].compute], [law().frontier.points[2].value])


def test_figure_without_a_law_says_why() -> None:
    (axes,) = draw_law(fit_law([point(1e12, 300.0, metric="fd_efflite0")])).axes
    assert any("no law fitted: 1 point" in text.get_text() for text in axes.texts)
    assert "EfficientNet-Lite0" in axes.get_ylabel()
    assert any("no points" in text.get_text() for text in draw_law(fit_law([])).axes[0].texts)
    damaged = draw_law(fit_law([point(1e12, float("nan")), point(0.0, 3.0)])).axes[0]
    assert any("no points" in text.get_text() for text in damaged.texts)


def test_points_of_unknown_size_and_of_many_sizes() -> None:
    compute = np.geomspace(1e10, 1e14, 40)
    unknown = law_chart(fit_law(curve_points(compute, 3e4 * compute**-0.3, num_params=0, images=0), settings=QUICK))
    assert [s.label for s in unknown.panels[0].series if s.legend == "sizes"] == ["unknown size"]
    many = law_chart(fit_law(curve_points(compute, 3e4 * compute**-0.3), settings=QUICK))
    labels = [s.label for s in many.panels[0].series if s.legend == "sizes"]
    assert len(labels) == 12
    assert labels[0] == "1 to 4"
    draw(many)


def test_the_published_law_is_drawn_where_points_reach_it_or_when_asked() -> None:
    def shown(metric: str, compute: float, *, paper: bool = False) -> list[str]:
        chart = law_chart(fit_law(curve_points([compute, 2 * compute], [4.0, 3.9], metric=metric)), paper=paper)
        return [s.shown for s in chart.panels[0].series if "Nichol" in s.label]

    assert shown("nll", 1e12) == ["offered"]
    assert shown("nll", 1e12, paper=True) == ["yes"]
    assert shown("nll", 1e19) == ["yes"]
    assert shown("fid", 1e19) == ["yes"]
    assert shown("fd_efflite0", 1e19, paper=True) == []


def test_figure_files(tmp_path: Path) -> None:
    figure = draw_law(law(), title="a $study$ of <names>")
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"law{suffix}"
        save_figure(figure, path)
        assert path.read_bytes().startswith(magic)
