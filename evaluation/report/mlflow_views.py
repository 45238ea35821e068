"""Saved views of the MLflow UI, built as plain data: no mlflow here.

A saved view is an experiment tag `mlflow.sharedViewState.<key>` whose value is JSON {name, createdAt, updatedAt, state}
with state = "deflate;" + base64(zlib(JSON)). The inner JSON is the UI's own chart layout (MLflow 3.17). The address
`#/experiments/ID/runs?viewStateShareKey=<key>&compareRunsMode=CHART` opens it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.tracking.points import BY_COMPUTE, COMPUTE

_TAG = "mlflow.sharedViewState."
_PREFIX = "deflate;"
_CARD_HEIGHT = 480  # pixels


@dataclass(frozen=True)
class Chart:
    """A line chart of a metric against the step, or against another metric that was logged at the same steps.

    The UI titles a chart with the metric's name. It draws a logarithmic x axis over steps only; over another metric the
    axis stays linear, whatever the layout says.
    """

    metric: str
    x_metric: str | None = None  # None: the step
    log_x: bool = True
    log_y: bool = True
    smoothness: int = 0  # 0 (none) to 100


@dataclass(frozen=True)
class Section:
    """A titled row of charts."""

    title: str
    charts: Sequence[Chart]
    num_columns: int = 2


@dataclass(frozen=True)
class SavedView:
    """A layout of charts over the runs of an experiment, opened by its key."""

    key: str
    name: str
    sections: Sequence[Section]
    run_filter: str = ""  # in the UI's search language
    columns: Sequence[str] = ()  # of the run table, such as "tags.`size`" or "metrics.`nll/test`"


def view_tag(view: SavedView, *, now_ms: int) -> tuple[str, str]:
    """The experiment tag (key, value) that makes the view known to the UI."""
    state = json.dumps(_state(view), separators=(",", ":"), sort_keys=True).encode()
    packed = _PREFIX + base64.b64encode(zlib.compress(state, 9)).decode()
    value = {"name": view.name, "createdAt": now_ms, "updatedAt": now_ms, "state": packed}
    return _TAG + view.key, json.dumps(value)


def decode_view(value: str) -> dict[str, Any]:
    """The chart layout in a tag's value, whether this program or the UI wrote it."""
    packed = json.loads(value)["state"]
    return dict(json.loads(zlib.decompress(base64.b64decode(packed.removeprefix(_PREFIX)))))


def view_address(server: str, experiment_id: str, key: str) -> str:
    """The address that opens the view on a running server, such as http://127.0.0.1:5000."""
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&compareRunsMode=CHART"


def scaling_view(metrics: Sequence[str], losses: Sequence[str] = ("train/loss",)) -> SavedView:
    """The study's view: the scaling curves of `metrics` (such as "nll/test") with the law over them, and the training.

    A metric's copy by compute is drawn, because only steps have a logarithmic axis (see trainer/tracking/points.py).
    """
    sections = [
        Section("Scaling (x: GFLOP of training)", [Chart(metric + BY_COMPUTE) for metric in metrics]),
        Section("Training (x: images seen)", [Chart(loss, smoothness=30) for loss in losses]),
        Section("Evaluations (x: metric compute)", [Chart(metric, COMPUTE) for metric in metrics]),
    ]
    columns = ["tags.`size`", "tags.`num_params`", *(f"metrics.`{metric}`" for metric in metrics)]
    return SavedView("scaling", "Scaling curves", sections, columns=columns)


def _state(view: SavedView) -> dict[str, Any]:
    charts = [
        _chart(chart, f"{view.key}-{i}-{j}", section=f"{view.key}-{i}")
        for i, section in enumerate(view.sections)
        for j, chart in enumerate(section.charts)
    ]
    sections = [
        {
            "uuid": f"{view.key}-{i}",
            "name": section.title,
            "display": True,
            "isReordered": True,
            "isGenerated": False,
            "columns": section.num_columns,
            "cardHeight": _CARD_HEIGHT,
        }
        for i, section in enumerate(view.sections)
    ]
    return {
        "searchFilter": view.run_filter,
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(view.columns),
        "runsHiddenMode": "SHOW_ALL",  # the UI's default draws ten runs
        "groupBy": None,
        "groupsExpanded": {},
        "hideEmptyCharts": False,
        "isAccordionReordered": True,
        "compareRunCharts": charts,
        "compareRunSections": sections,
    }


def _chart(chart: Chart, uuid: str, *, section: str) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "type": "LINE",
        "metricSectionId": section,
        "displayName": chart.metric,
        "isGenerated": False,  # the UI rearranges what it generated itself
        "deleted": False,
        "runsCountToCompare": 100,
        "metricKey": chart.metric,
        "selectedMetricKeys": [chart.metric],
        "xAxisKey": "metric" if chart.x_metric else "step",
        "selectedXAxisMetricKey": chart.x_metric or "",
        "xAxisScaleType": "log" if chart.log_x else "linear",
        "scaleType": "log" if chart.log_y else "linear",
        "lineSmoothness": chart.smoothness,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
    }
