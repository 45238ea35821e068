"""Charts of learning curves, of the training, of sizes and budgets, and of samples."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_study import QUICK, law, write_runs
from scaling_points import SIZES as LADDER
from scaling_points import curve_points, point

from evaluation.report.curve_charts import curves_chart, gap_chart
from evaluation.report.figures import draw
from evaluation.report.interactive import plotly_figure
from evaluation.report.run_files import NUM_BINS, RunFiles, RunRecords, read_runs
from evaluation.report.sample_grids import MAX_GRIDS, data_uri, draw_samples, sample_strips
from evaluation.report.size_charts import budget_table, isoflop_chart, size_data_chart, size_findings
from evaluation.report.training_charts import quartiles_chart, speed_chart
from evaluation.scaling.law import fit_law
from evaluation.scaling.points import Point
from trainer.tracking.records import TrainRecord

SIZES = (1e6, 3e6, 1e7, 3e7, 1e8)


def hoffmann(num_params: float, images: float) -> float:
    return 1.5 + 400 * num_params**-0.4 + 300 * images**-0.35


def budget_points() -> list[Point]:
    """Five sizes at six budgets, one run a size, with compute 6 N D and values of an L(N, D)."""
    points = []
    for budget in np.geomspace(3e15, 3e18, 6):
        for size in SIZES:
            images = budget / (6 * size)
            points.append(
                point(budget, hoffmann(size, images), num_params=int(size), images=int(images), run=f"run{size:g}")
            )
    return points


def test_learning_curves_have_every_run_and_the_mean_over_seeds() -> None:
    chart = curves_chart(law())
    assert chart is not None
    (panel,) = chart.panels
    assert panel.x.label == "images seen in training"
    assert panel.x.log
    assert panel.y.log
    labelled = [s for s in panel.series if s.label]
    assert [s.label for s in labelled] == ["420 k", "940 k", "1.68 M", "3.7 M"]
    assert all(s.error is not None for s in labelled)
    drawn = [x for s in panel.series for x in s.x if np.isfinite(x)]
    assert sorted(set(drawn)) == sorted(
        {float(p.images) for p in (*law().frontier.admitted, *(e.point for e in law().frontier.exclusions))}
    )
    assert curves_chart(fit_law(curve_points([1e12, 2e12], [4, 3], images=0))) is None


def test_a_difference_is_drawn_with_its_negative_values() -> None:
    points = [
        point(1e12 * k, value, metric="nll_gap", split="", run=f"s{seed}", seed=seed, images=1000 * k, stderr=0.01)
        for seed, values in enumerate(([-0.02, 0.01, 0.04], [0.0, 0.03, 0.06]))
        for k, value in enumerate(values, start=1)
    ]
    chart = gap_chart(fit_law(points))
    assert chart is not None
    (panel,) = chart.panels
    assert not panel.y.log
    assert panel.y.low < -0.03
    runs, mean = panel.series[1:]
    assert sorted(v for v in runs.y if np.isfinite(v)) == [-0.02, 0.0, 0.01, 0.03, 0.04, 0.06]
    assert [v for v in mean.y if np.isfinite(v)] == pytest.approx([-0.01, 0.02, 0.05])


def test_loss_by_quartile_has_a_panel_a_quartile_and_every_size(tmp_path: Path) -> None:
    chart = quartiles_chart(read_runs(write_runs(tmp_path)))
    assert chart is not None
    assert [len(row) for row in chart.rows] == [4]  # these runs have no vb
    for q, panel in enumerate(chart.panels):
        assert [s.label for s in panel.series] == ["420 k", "940 k", "1.68 M", "3.7 M"]
        assert max(panel.series[0].y[:20]) == q + 1
    draw(chart)
    plotly_figure(chart)


def test_a_long_training_curve_is_averaged_in_bins_of_log_images() -> None:
    records = tuple(TrainRecord(100 * i, 1e9 * i, float(i), {"train/loss": 2.0 + (-1) ** i}) for i in range(1, 5001))
    curve = RunRecords(RunFiles("run", Path("nowhere"), 10), records).curve("train/loss")
    assert 30 < len(curve) <= NUM_BINS
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
    assert curve[-1][1] == pytest.approx(2.0, abs=0.02)
    assert RunRecords(RunFiles("run", Path("nowhere"), 10), ()).curve("train/loss") == []


def test_speed_is_a_dot_a_run(tmp_path: Path) -> None:
    chart = speed_chart(read_runs(write_runs(tmp_path)))
    assert chart is not None
    rate, mfu = chart.panels
    assert [x for s in rate.series for x in s.x] == [float(size) for size, _ in LADDER for _ in range(2)]
    assert {y for s in mfu.series for y in s.y} == {0.2}
    assert speed_chart([]) is None
    assert quartiles_chart([]) is None


def test_samples_are_a_strip_a_size_in_order_of_compute(tmp_path: Path) -> None:
    runs = read_runs(write_runs(tmp_path))
    strips = sample_strips(runs)
    assert [s.label for s in strips] == ["420 k", "940 k", "1.68 M", "3.7 M"]
    assert [g.images for g in strips[0].grids] == [256, 1024, 4096]
    assert [g.compute for g in strips[0].grids] == pytest.approx([256 * 4.76e8, 1024 * 4.76e8, 4096 * 4.76e8])
    assert strips[0].grids[0].label == "256 images\n1.2×10¹¹ FLOPs"
    assert data_uri(strips[0].grids[0].path).startswith("data:image/jpeg;base64,")
    assert len(draw_samples(strips).axes) == 12
    first = runs[0].run.folder / "samples"
    for nimg in range(5000, 5030):
        shutil.copy(first / "000000000256.png", first / f"{nimg:012d}.png")
    chosen = sample_strips(runs)[0].grids
    assert len(chosen) == MAX_GRIDS
    assert (chosen[0].images, chosen[-1].images) == (256, 5029)


def test_equal_compute_has_a_parabola_a_budget_and_laws_through_the_minima() -> None:
    found = size_findings(fit_law(budget_points(), settings=QUICK), num_rounds=20)
    assert found is not None
    chart = isoflop_chart(found)
    assert chart is not None
    values, sizes, images = chart.panels
    slices = found.isoflop.slices
    assert [s.label for s in values.series if s.label] == [s.label for s in values.series if s.marker == "dot"]
    assert len([s for s in values.series if s.marker == "dot"]) == len(slices) == 6
    minima = [(s.x[0], s.y[0]) for s in values.series if s.marker == "cross"]
    assert minima == [(s.optimal_size, s.optimal_value) for s in slices if s.optimal_size is not None]
    for panel, law_of in ((sizes, found.isoflop.size_law), (images, found.isoflop.images_law)):
        assert law_of is not None
        line = next(s for s in panel.series if s.width)
        assert line.y == pytest.approx(law_of(line.x))
        assert f"grows as C to the {law_of.exponent:.3g}" in line.label
    draw(chart)
    plotly_figure(chart)


def test_value_by_size_and_images_lies_on_the_fitted_law() -> None:
    found = size_findings(fit_law(budget_points(), settings=QUICK), num_rounds=20)
    assert found is not None
    chart = size_data_chart(found)
    assert chart is not None
    top, below = chart.panels
    assert [s.label for s in top.series if s.legend == "sizes" and s.label] == ["1 M", "3 M", "10 M", "30 M", "100 M"]
    lines = [s for s in top.series if s.width and s.x]
    for size, line in zip(SIZES, lines, strict=True):
        assert line.y == pytest.approx([hoffmann(size, x) for x in line.x], rel=1e-3)
    assert max(abs(v) for s in below.series for v in s.y) < 1e-3
    budgets = budget_table(found)
    assert [row[0] for row in budgets.rows] == ["1×", "10×", "100×"]
    assert budgets.rows[2][-1].startswith("compute 100×")
    draw(chart)


def test_sizes_that_are_not_known_give_no_findings() -> None:
    assert size_findings(fit_law(curve_points([1e12, 2e12], [4, 3], images=0))) is None
    assert size_findings(fit_law([])) is None
    one = size_findings(fit_law([dataclasses.replace(p, num_params=10) for p in curve_points([1e12, 2e12], [4, 3])]))
    assert one is not None
    assert isoflop_chart(one) is None
    assert size_data_chart(one) is None
    assert budget_table(one).rows == []
