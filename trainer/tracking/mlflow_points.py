"""Evaluated points read back from a tracker: those of our own studies, and those of anybody's runs.

Our runs say in their tags what was measured and how compute was counted; so a point is rebuilt exactly as the study's
files have it. Of other runs only the metrics are known, and what parameters or tags hold the rest must be named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run

from data_pipeline.errors import DataError
from trainer.tracking.mlflow_store import require_answer, search_experiments, search_runs
from trainer.tracking.points import COMPUTE, STDERR
from trainer.tracking.run_view import MEASURED_TAG
from trainer.tracking.uri import default_uri, redact, sqlite_file

STEP = "step"
_ROUNDED_FROM = 1000  # a smaller count that is not whole is given in another unit
_OUR_VALUE = "value"  # the default name of the value's column: all that our runs have measured
_UNSTATED = "unstated"


@dataclass(frozen=True)
class Names:
    """Where the fields of a point are: metrics (compute, also "step"; value; stderr), params or tags (the rest)."""

    compute: str
    value: str
    stderr: str | None = None
    run: str | None = None
    num_params: str | None = None
    images: str | None = None


def points_of_experiment(
    experiment: str,
    *,
    compute: str = COMPUTE,
    value: str = _OUR_VALUE,
    stderr: str | None = None,
    run: str | None = None,
    num_params: str | None = None,
    images: str | None = None,
) -> list[dict[str, Any]]:
    """The fields of the points (see evaluation.scaling.points.Point) of an experiment at the default address.

    Args:
        value: a metric; "value": every evaluation that our own runs have made in the usual way.
        compute: a metric logged at the same steps, or "step".
        stderr: a metric logged at the same steps; None: our own `<value>_stderr` where there is one.
        run, num_params, images: a parameter or tag, `images` also a metric or "step"; None: as our own runs have it.

    Raises:
        DataError: no such tracker, experiment, metric, parameter or tag, or no value has its compute.
    """
    names = Names(compute, value, stderr, run, num_params, images)
    uri = default_uri()
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise DataError(f"there is no MLflow database {database}; set MLFLOW_TRACKING_URI to the one that is meant.")
    with require_answer(uri, DataError):
        client = MlflowClient(tracking_uri=uri)
        found = _experiment(client, experiment)
        runs = [entry for entry in search_runs(client, found.experiment_id) if _is_read(entry, names)]
        metrics = sorted({metric for entry in runs for metric in entry.data.metrics})
        if not runs:
            raise DataError(_nothing(client, found, names))
        readers = [_RunReader(client, entry, names) for entry in sorted(runs, key=_order)]
        points = [point for reader in readers for point in reader.points()]
    if not points:
        raise DataError(
            f"MLflow experiment {experiment!r}: no value of {value!r} has {compute!r} at the same step; give another "
            f"--x (a metric, or {STEP!r}). It has the metrics {', '.join(metrics)}."
        )
    return points


@dataclass(frozen=True)
class _RunReader:
    """One run of a tracker, and where its points' fields are."""

    client: MlflowClient
    run: Run
    names: Names

    def points(self) -> Iterator[dict[str, Any]]:
        for metric in _metrics_of(self.run, self.names):
            yield from self._points_of(metric)

    def _points_of(self, metric: str) -> Iterator[dict[str, Any]]:
        values = self._history(metric)
        computes = self._at_steps(self.names.compute, values)
        errors = self._history(self.names.stderr or metric + STDERR)
        if self.names.stderr is not None and not errors:
            raise DataError(f"run {self.run.info.run_name!r} has no metric {self.names.stderr!r}.")
        ours = MEASURED_TAG + metric in self.run.data.tags
        name, _, split = metric.partition(" - ")[0].partition("/") if ours else (metric, "", "")
        for step, value in sorted(values.items()):
            if step in computes:
                yield {
                    "metric": name, "split": split, "value": value,
                    "stderr": errors.get(step), "compute": computes[step], "num_params": self._num_params(),
                    "images": self._images(step, ours), "run": self._name(), "seed": self._whole("seed") or 0,
                } | self._measured(metric, step)  # fmt: skip

    def _history(self, metric: str) -> dict[int, float]:
        """By step; of several values at one step the last counts. What is not finite is no value."""
        if metric not in self.run.data.metrics:
            return {}
        history = self.client.get_metric_history(self.run.info.run_id, metric)
        ordered = sorted(history, key=lambda entry: entry.timestamp)
        return {entry.step: entry.value for entry in ordered if math.isfinite(entry.value)}

    def _at_steps(self, name: str, values: Mapping[int, float]) -> dict[int, float]:
        return {step: float(step) for step in values} if name == STEP else self._history(name)

    def _measured(self, metric: str, step: int) -> dict[str, str]:
        """Data, way of measuring and FLOP convention, as the importer has noted them."""
        tag = self.run.data.tags.get(MEASURED_TAG + metric)
        if tag is None:
            return {"data": "", "measured": "", "flop_convention": self.run.data.tags.get("flop_convention", _UNSTATED)}
        for way in json.loads(tag):
            if way["images"] is None or step in way["images"]:
                measured = json.dumps(way["measured"], sort_keys=True)
                return {"data": way["data"], "measured": measured, "flop_convention": way["flop_convention"]}
        raise DataError(f"run {self.run.info.run_name!r}: its tag {MEASURED_TAG + metric!r} lacks step {step}.")

    def _name(self) -> str:
        if self.names.run is not None:
            return self._text(self.names.run)
        return str(self.run.data.tags.get("trial") or self.run.info.run_name or self.run.info.run_id)

    def _num_params(self) -> int:
        return self._whole(self.names.num_params or "num_params", required=self.names.num_params is not None) or 0

    def _images(self, step: int, ours: bool) -> int:
        name = self.names.images
        if name == STEP or (name is None and ours):
            return step
        if name is None:
            return 0
        history = self._history(name)
        return int(history[step]) if step in history else self._whole(name, required=True) or 0

    def _text(self, name: str) -> str:
        data = self.run.data
        found = data.params.get(name, data.tags.get(name))
        if found is None:
            raise DataError(f"run {self.run.info.run_name!r} has no parameter and no tag {name!r}.")
        return str(found)

    def _whole(self, name: str, *, required: bool = False) -> int | None:
        """A whole number among the parameters, tags and last metrics."""
        data = self.run.data
        text = data.params.get(name, data.tags.get(name, data.metrics.get(name)))
        if text is None and not required:
            return None
        text = self._text(name) if text is None else text
        try:
            number = float(text)
            if number < 0 or (number < _ROUNDED_FROM and number != int(number)):
                raise ValueError
            return round(number)
        except (ValueError, OverflowError):
            raise DataError(
                f"run {self.run.info.run_name!r}: {name} = {text!r} is not a whole number from 0; give counts, not "
                "billions."
            ) from None


def _experiment(client: MlflowClient, name: str) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        others = ", ".join(sorted(entry.name for entry in search_experiments(client)))
        raise DataError(f"MLflow at {redact(default_uri())} has no experiment {name!r}; it has: {others or 'none'}.")
    return found


def _is_read(run: Run, names: Names) -> bool:
    """Fits and reports are no points, nor are trials that a study leaves out of its fits."""
    tags = run.data.tags
    if tags.get("kind") in ("law", "report") or tags.get("fitted") == "no":
        return False
    return bool(_metrics_of(run, names))


def _metrics_of(run: Run, names: Names) -> list[str]:
    """The metrics of a run whose values are wanted."""
    ours = sorted(tag.removeprefix(MEASURED_TAG) for tag in run.data.tags if tag.startswith(MEASURED_TAG))
    if names.value == _OUR_VALUE and ours:
        return [name for name in ours if " - " not in name]  # those behind a dash were measured in another way
    return [names.value] if names.value in run.data.metrics else []


def _order(run: Run) -> tuple[float, str]:
    return run.data.metrics.get("num_params", 0.0), str(run.info.run_name)


def _nothing(client: MlflowClient, experiment: Experiment, names: Names) -> str:
    """Why no run has points."""
    metrics: set[str] = set()
    for run in search_runs(client, experiment.experiment_id):
        metrics |= run.data.metrics.keys()
    listed = _shortened(sorted(metrics))
    if names.value == _OUR_VALUE:
        return (
            f"MLflow experiment {experiment.name!r} holds no run of ours with an evaluation. Name a metric with --y, "
            f"and with --x the metric of its compute (or {STEP!r}). It has: {listed}."
        )
    return f"MLflow experiment {experiment.name!r} has no run with the metric {names.value!r}; it has: {listed}."


def _shortened(names: Sequence[str], at_most: int = 40) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return (", ".join(names[:at_most]) + more) or "no metrics"
