"""Saved views as the UI reads them."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from evaluation.report.mlflow_views import (
    SavedView,
    address_of_tag,
    artifact_address,
    decode_view,
    experiment_tags,
    study_views,
    view_address,
    view_tag,
)

METRICS = ["nll/test", "fd_efflite0/test"]


def layout(key: str) -> dict[str, Any]:
    (view,) = [view for view in study_views(METRICS) if view.key == key]
    return decode_view(view_tag(view)[1])


def test_a_view_is_an_experiment_tag_of_compressed_layout() -> None:
    key, value = view_tag(study_views(METRICS)[0], now_ms=1234)
    assert key == "mlflow.sharedViewState.scaling"
    outer = json.loads(value)
    assert outer["name"] == "Scaling curves"
    assert (outer["createdAt"], outer["updatedAt"]) == (1234, 1234)
    assert outer["state"].startswith("deflate;")
    inner = json.loads(zlib.decompress(base64.b64decode(outer["state"].removeprefix("deflate;"))))
    assert inner == decode_view(value)


def test_every_tag_fits_into_the_smallest_of_mlflows_stores() -> None:
    many = [f"{metric}/{split}" for metric in ("nll", "fid", "sfid", "fd_efflite0") for split in ("test", "train")]
    assert max(len(value) for value in experiment_tags("study", many).values()) < 5000


def test_the_scaling_charts_have_logarithmic_axes_and_show_every_run() -> None:
    found = layout("scaling")
    by_metric = {chart["metricKey"]: chart for chart in found["compareRunCharts"] if "GFLOP" in chart["metricKey"]}
    assert set(by_metric) == {f"{metric} by GFLOP" for metric in METRICS}
    for chart in by_metric.values():
        assert (chart["xAxisKey"], chart["xAxisScaleType"], chart["scaleType"]) == ("step", "log", "log")
        assert (chart["useGlobalXaxisKey"], chart["isGenerated"], chart["type"]) == (False, False, "LINE")
    assert {c["selectedXAxisMetricKey"] for c in found["compareRunCharts"] if c["xAxisKey"] == "metric"} == {"compute"}
    assert found["runsHiddenMode"] == "SHOW_ALL"
    assert found["groupBy"] is None
    assert found["searchFilter"] == "tags.drawn = 'yes'"


def test_the_other_views_are_of_the_trials_and_the_table_of_fits_has_no_charts() -> None:
    charts = {
        key: {chart["metricKey"] for chart in layout(key)["compareRunCharts"]} for key in ("training", "throughput")
    }
    assert {"train/loss", "train/mse_q0", "train/mse_q3", "train/grad_norm", "train/lr"} <= charts["training"]
    assert {"speed/img_per_second", "speed/mfu", "system/cpu_utilization_percentage"} <= charts["throughput"]
    assert {layout(key)["searchFilter"] for key in charts} == {"tags.kind = 'trial'"}
    fits = layout("fits")
    assert fits["compareRunCharts"] == []
    assert fits["searchFilter"] == "tags.kind = 'law'"
    assert {"metrics.`exponent`", "metrics.`exponent_low`", "metrics.`held_out_error`"} <= set(fits["selectedColumns"])
    trials = layout("trials")
    assert trials["compareRunCharts"] == []
    assert {"tags.`state`", "tags.`last_trouble`", f"metrics.`{METRICS[0]}`"} <= set(trials["selectedColumns"])


def test_every_chart_is_in_a_section_that_exists() -> None:
    for view in study_views(METRICS):
        found = decode_view(view_tag(view)[1])
        sections = {section["uuid"] for section in found["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in found["compareRunCharts"]} == sections
        uuids = [chart["uuid"] for chart in found["compareRunCharts"]]
        assert len(uuids) == len(set(uuids))


def test_addresses_open_charts_or_the_table_of_a_view_and_an_artifact() -> None:
    server, menu = "http://127.0.0.1:5000", "workflowType=machine_learning"
    assert view_address(server, "7", "scaling") == (
        f"{server}/#/experiments/7/runs?viewStateShareKey=scaling&compareRunsMode=CHART&{menu}"
    )
    modes = {}
    for view in [*study_views(METRICS), SavedView("own", "Own", "")]:
        key, value = view_tag(view)
        name, address = address_of_tag(key.rpartition(".")[2], value, server, "7")
        modes[name] = address.partition("compareRunsMode=")[2].partition("&")[0]
    assert modes == {
        "Scaling curves": "CHART", "Training": "CHART", "Throughput": "CHART", "Trials": "TABLE", "Fits": "TABLE",
        "Own": "TABLE",
    }  # fmt: skip
    assert artifact_address(server, "7", "abc", "report.html") == (
        f"{server}/#/experiments/7/runs/abc/artifacts/report.html?{menu}"
    )


def test_the_description_links_to_every_view() -> None:
    text = experiment_tags("cifar", METRICS)["mlflow.note.content"]
    for view in study_views(METRICS):
        assert f"[{view.name}](#/experiments/{{experiment}}/runs?viewStateShareKey={view.key}&" in text.replace(
            "(/#", "(#"
        )
    assert "{report}/artifacts/report.html" in text
