"""Saved views as the UI reads them."""

from __future__ import annotations

import base64
import json
import zlib

from evaluation.report.mlflow_views import decode_view, scaling_view, view_address, view_tag


def test_a_view_is_an_experiment_tag_of_compressed_layout() -> None:
    key, value = view_tag(scaling_view(["nll/test"]), now_ms=1234)
    assert key == "mlflow.sharedViewState.scaling"
    outer = json.loads(value)
    assert outer["name"] == "Scaling curves"
    assert (outer["createdAt"], outer["updatedAt"]) == (1234, 1234)
    assert outer["state"].startswith("deflate;")
    inner = json.loads(zlib.decompress(base64.b64decode(outer["state"].removeprefix("deflate;"))))
    assert inner == decode_view(value)
    assert len(value) < 5000  # MLflow's limit for an experiment tag on some stores


def test_the_scaling_charts_have_logarithmic_axes_and_show_every_run() -> None:
    layout = decode_view(view_tag(scaling_view(["nll/test", "fd_efflite0/test"]), now_ms=0)[1])
    by_metric = {chart["metricKey"]: chart for chart in layout["compareRunCharts"]}
    for metric in ("nll/test", "fd_efflite0/test"):
        chart = by_metric[f"{metric} by GFLOP"]
        assert (chart["xAxisKey"], chart["xAxisScaleType"], chart["scaleType"]) == ("step", "log", "log")
        assert (chart["useGlobalXaxisKey"], chart["isGenerated"], chart["type"]) == (False, False, "LINE")
        against_compute = by_metric[metric]
        assert (against_compute["xAxisKey"], against_compute["selectedXAxisMetricKey"]) == ("metric", "compute")
    assert "train/loss" in by_metric
    assert layout["runsHiddenMode"] == "SHOW_ALL"
    assert layout["groupBy"] is None


def test_every_chart_is_in_a_section_that_exists() -> None:
    layout = decode_view(view_tag(scaling_view(["nll/test"]), now_ms=0)[1])
    sections = {section["uuid"] for section in layout["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in layout["compareRunCharts"]} == sections
    uuids = [chart["uuid"] for chart in layout["compareRunCharts"]]
    assert len(uuids) == len(set(uuids))


def test_the_address_opens_the_view_in_chart_mode() -> None:
    address = view_address("http://127.0.0.1:5000", "7", "scaling")
    assert address == "http://127.0.0.1:5000/#/experiments/7/runs?viewStateShareKey=scaling&compareRunsMode=CHART"
