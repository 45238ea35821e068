"""Figures for the screen: the same content as in print, with words for the pointer."""

from __future__ import annotations

import dataclasses
import math

import pytest
from report_study import law
from scaling_points import point

from evaluation.report.chart import Axis, Chart, Panel, Series
from evaluation.report.figures import draw
from evaluation.report.interactive import plotly_figure
from evaluation.report.law_chart import law_chart
from evaluation.report.palette import form_colour
from evaluation.scaling.law import fit_law


def test_the_laws_figure_has_the_curves_of_every_size_on_log_axes_and_the_law_on_top() -> None:
    figure = plotly_figure(law_chart(law(), title="a study"))
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == figure.layout.xaxis2.type == "log"
    assert figure.layout.yaxis2.type == "linear"
    traces = [t for t in figure.data if t.showlegend]
    assert [t.name for t in traces if t.legend == "legend"] == ["420 k", "940 k", "1.68 M", "3.7 M"]
    for size in {p.num_params for p in law().frontier.candidates}:
        wanted = sorted(p.compute for p in law().frontier.candidates if p.num_params == size)
        assert any([x for x in t.x if x is not None] == pytest.approx(wanted) for t in traces)
    best = law().best
    assert best is not None
    last_size = max(i for i, t in enumerate(figure.data) if t.legend == "legend" and t.yaxis == "y")
    on_top = [i for i, t in enumerate(figure.data) if t.line.color == form_colour(best.fit.form) and t.mode == "lines"]
    assert max(on_top) > last_size


def test_axes_of_print_and_screen_are_the_same() -> None:
    chart = law_chart(law())
    axes, layout = draw(chart).axes[0], plotly_figure(chart).layout
    assert [10**v for v in layout.xaxis.range] == pytest.approx(axes.get_xlim())
    assert [10**v for v in layout.yaxis.range] == pytest.approx(axes.get_ylim())


def test_the_pointer_reads_run_seed_images_compute_value_and_standing() -> None:
    figure = plotly_figure(law_chart(law()))
    words = [text for t in figure.data for text in (t.text or ()) if text]
    mean = next(text for text in words if text.startswith("mean of 2 seeds, 420,000 parameters<br>"))
    assert "420 k, " in mean
    assert " images, " in mean
    assert " FLOPs<br>NLL (bits/dim): " in mean
    assert " ± " in mean
    assert any("not on the frontier: run " in text for text in words)
    assert any(text.endswith("on the frontier") for text in words)
    assert any(text.startswith("size420000-seed1, seed 1<br>") for text in words)
    assert any("after 600 images, before the first 1000" in text for text in words)


def test_doubtful_laws_wait_for_a_click() -> None:
    fits = tuple(
        dataclasses.replace(f, fit=dataclasses.replace(f.fit, status="unidentified", message="too few."))
        for f in law().fits
    )
    figure = plotly_figure(law_chart(dataclasses.replace(law(), fits=fits)))
    waiting = [t.name for t in figure.data if t.visible == "legendonly" and t.showlegend]
    assert any(name.startswith("power law: unidentified, not drawn") for name in waiting)
    assert any("Nichol" in name and "×2" in name for name in waiting)


def test_names_are_text_and_never_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    points = [point(1e12 * k, 5 - 0.1 * k, run=evil, metric=evil, num_params=0) for k in range(1, 7)]
    figure = plotly_figure(law_chart(fit_law(points), title=evil))
    assert "<img" not in figure.to_json().replace("\\u003c", "<")
    assert "&lt;img" in figure.layout.title.text


def test_gaps_between_runs_and_points_that_are_missing_become_null() -> None:
    series = Series([1.0, math.nan, 2.0], [1.0, math.nan, math.inf], "#123456", width=1.0)
    axis = Axis("x", 1.0, 2.0)
    (trace,) = plotly_figure(Chart("", ((Panel(axis, axis, (series,)),),))).data
    assert list(trace.x) == [1.0, None, 2.0]
    assert list(trace.y) == [1.0, None, None]


def test_a_figure_without_a_law_says_why() -> None:
    for points, message in (([], "no points to draw"), ([point(1e12, 300.0)], "no law fitted: 1 point")):
        figure = plotly_figure(law_chart(fit_law(points)))
        assert any(message in a.text for a in figure.layout.annotations)
