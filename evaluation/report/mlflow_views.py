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

from evaluation.report.style import metric_label, split_label
from trainer.tracking.points import BY_COMPUTE, COMPUTE

_TAG = "mlflow.sharedViewState."
_PREFIX = "deflate;"
_CARD_HEIGHT = 480  # pixels
_TRAINING = "workflowType=machine_learning"  # the UI's menu for training runs, not that for language-model applications
REPORT = "report.html"
_NUM_PARAMS = "metrics.`num_params`"


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
    markers: bool = False


@dataclass(frozen=True)
class Section:
    """A titled row of charts."""

    title: str
    charts: Sequence[Chart]
    num_columns: int = 2


@dataclass(frozen=True)
class SavedView:
    """A layout over the runs of an experiment, opened by its key: charts, or the run table where it has none."""

    key: str
    name: str
    about: str  # what it shows, in a few words
    sections: Sequence[Section] = ()
    run_filter: str = ""  # in the UI's search language
    columns: Sequence[str] = ()  # of the run table, such as "tags.`size`" or "metrics.`nll/test`"
    order_by: str = "attributes.start_time"


def view_tag(view: SavedView, *, now_ms: int = 0) -> tuple[str, str]:
    """The experiment tag (key, value) that makes the view known to the UI."""
    state = json.dumps(_state(view), separators=(",", ":"), sort_keys=True).encode()
    packed = _PREFIX + base64.b64encode(zlib.compress(state, 9)).decode()
    value = {"name": view.name, "createdAt": now_ms, "updatedAt": now_ms, "state": packed}
    return _TAG + view.key, json.dumps(value)


def decode_view(value: str) -> dict[str, Any]:
    """The chart layout in a tag's value, whether this program or the UI wrote it."""
    packed = json.loads(value)["state"]
    return dict(json.loads(zlib.decompress(base64.b64decode(packed.removeprefix(_PREFIX)))))


def view_address(server: str, experiment_id: str, key: str, *, table: bool = False) -> str:
    """The address that opens the view on a running server, such as http://127.0.0.1:5000."""
    mode = "TABLE" if table else "CHART"
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&compareRunsMode={mode}&{_TRAINING}"


def artifact_address(server: str, experiment_id: str, run_id: str, path: str) -> str:
    """The address that shows a run's artifact."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}?{_TRAINING}"


def study_views(metrics: Sequence[str]) -> list[SavedView]:
    """A study's views. `metrics` are those that laws are sought for, such as "nll/test", the main one first."""
    return [_scaling_view(metrics), _training_view(), _throughput_view(), _trials_view(metrics), _fits_view()]


def experiment_tags(study: str, metrics: Sequence[str]) -> dict[str, str]:
    """The tags of a study's experiment: its views, a description with links to them, and what kind it is.

    `{experiment}` and `{report}` in the description stand for the ids, which only the tracker knows.
    """
    views = study_views(metrics)
    links = [f"[{view.name}]({address_of(view)})" for view in views]
    links.append(f"[Report]({artifact_address('', '{experiment}', '{report}', REPORT)[1:]})")
    # The UI shows the first line; the rest unfolds.
    text = (
        f"Study **{study}**: "
        + " · ".join(links)
        + "\n\nA run a trial (tags `size`, `seed`), a run a fit (`law METRIC: "
        "FORM`), and the run `report` with the study's files.\n\n"
        + "\n".join(f"- {view.name}: {view.about}" for view in views)
    )
    # The kind makes the UI open the experiment as one of training runs.
    kind = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": text}
    return dict(view_tag(view) for view in views) | kind


def address_of(view: SavedView, server: str = "", experiment_id: str = "{experiment}") -> str:
    """The view's address; without a server, one for links within the UI."""
    address = view_address(server, experiment_id, view.key, table=not view.sections)
    return address if server else address[1:]


def address_of_tag(key: str, value: str, server: str, experiment_id: str) -> tuple[str, str]:
    """(name, address) of a view as it stands in an experiment's tag: this program's, or one saved in the UI."""
    table = not decode_view(value).get("compareRunCharts")
    return str(json.loads(value)["name"]), view_address(server, experiment_id, key, table=table)


def _scaling_view(metrics: Sequence[str]) -> SavedView:
    """The curves of every size with the laws over them.

    A metric's copy by compute is drawn, because only steps have a logarithmic axis (see trainer/tracking/points.py).
    """
    sections = [
        Section(f"{_label(metric)}; x: GFLOP", [Chart(metric + BY_COMPUTE, markers=True)], num_columns=1)
        for metric in metrics
    ]
    over_images = [Chart(metric, markers=True) for metric in metrics]
    over_compute = [Chart(metric, COMPUTE, markers=True) for metric in metrics]
    sections.append(Section("The same; x: images seen", over_images))
    sections.append(Section("The same; x: FLOP, linear", over_compute))
    columns = ["tags.`size`", "tags.`seed`", _NUM_PARAMS, *(f"metrics.`{metric}`" for metric in metrics)]
    return SavedView(
        "scaling", "Scaling curves", "every size's curve, log-log, with the fitted laws drawn over them", sections,
        run_filter="tags.drawn = 'yes'", columns=columns, order_by=_NUM_PARAMS,
    )  # fmt: skip


def _training_view() -> SavedView:
    quartiles = range(4)
    sections = [
        Section("Loss; x: images seen", [_smooth("train/loss"), _smooth("train/mse"), _smooth("train/vb")]),
        Section("MSE by quartile of t", [_smooth(f"train/mse_q{q}") for q in quartiles]),
        Section("Variational bound by quartile of t", [_smooth(f"train/vb_q{q}") for q in quartiles]),
        Section("Optimisation", [_smooth("train/grad_norm"), *_plain("train/lr", "train/loss_scale")]),
        Section("Health", _plain("train/skipped_steps", "train/loss_spike", "train/nonfinite_images",
                                 "data/replaced_images")),
    ]  # fmt: skip
    columns = ["tags.`size`", "tags.`seed`", _NUM_PARAMS, "metrics.`train/loss`", "metrics.`train/grad_norm`"]
    return _of_trials(
        "training", "Training", "losses, by quartile of t too, gradients, learning rate", sections, columns
    )


def _throughput_view() -> SavedView:
    sections = [
        Section("Speed", _plain("speed/img_per_second", "speed/mfu", "speed/flops_per_second",
                                "speed/data_wait_share")),
        Section("Time of a step (seconds)", _plain("speed/step_seconds_p50", "speed/step_seconds_p95",
                                                   "speed/step_seconds_max", "speed/forward_seconds")),
        Section("Memory", _plain("memory/host_gb", "memory/device_peak_gb", "system/system_memory_usage_percentage",
                                 "system/gpu_0_memory_usage_percentage")),
        Section("Machine", _plain("system/cpu_utilization_percentage", "system/gpu_0_utilization_percentage",
                                  "system/gpu_0_power_usage_watts", "system/disk_available_megabytes")),
    ]  # fmt: skip
    columns = ["tags.`size`", _NUM_PARAMS, "metrics.`speed/img_per_second`", "metrics.`speed/mfu`"]
    columns += ["metrics.`speed/data_wait_share`", "metrics.`memory/device_peak_gb`"]
    return _of_trials("throughput", "Throughput", "speed, step times, memory, machine", sections, columns)


def _trials_view(metrics: Sequence[str]) -> SavedView:
    """A table: a row a trial, how it is doing and where."""
    # The UI puts metrics before tags: only the main one, so that all of a trial's state is seen at once.
    columns = [f"metrics.`{metric}`" for metric in metrics[:1]]
    columns += [f"tags.`{name}`" for name in ("state", "progress", "device", "retries", "last_trouble")]
    return _of_trials("trials", "Trials", "a row a trial: state, progress, device, retries, last trouble", (), columns)


def _fits_view() -> SavedView:
    """A table: a row a fit, a column a number."""
    # The UI orders metrics by name and puts tags behind them: what is not needed at first sight is left to its menu.
    numbers = (
        "constant", "constant_low", "constant_high", "exponent", "exponent_low", "exponent_high", "held_out_error",
        "num_points", "r2_log",
    )  # fmt: skip
    columns = [*(f"metrics.`{name}`" for name in numbers), "params.`intervals`", "tags.`status`", "tags.`best`"]
    about = "a row a fit: parameters with intervals, quality, certificate"
    return SavedView("fits", "Fits", about, (), "tags.kind = 'law'", columns, "attributes.run_name")


def _of_trials(key: str, name: str, about: str, sections: Sequence[Section], columns: Sequence[str]) -> SavedView:
    return SavedView(key, name, about, sections, "tags.kind = 'trial'", columns, _NUM_PARAMS)


def _smooth(metric: str) -> Chart:
    return Chart(metric, smoothness=30)


def _plain(*metrics: str) -> list[Chart]:
    return [Chart(metric, log_x=False, log_y=False) for metric in metrics]


def _label(metric: str) -> str:
    name, _, split = metric.partition("/")
    return f"{metric_label(name)}, {split_label(split)}" if split else metric_label(name)


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
        "orderByKey": view.order_by,
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(view.columns),
        "runsHiddenMode": "SHOW_ALL",  # the UI's default draws ten runs
        "groupBy": None,
        "groupsExpanded": {},
        "hideEmptyCharts": True,
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
        "displayPoints": chart.markers,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
    }
