"""A tracking store: one experiment at one address, asked and written through mlflow's client.

Only the modules `trainer/tracking/mlflow_*` import mlflow.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# A tracker that does not answer must not hold us for long (we come back ourselves), and nothing is sent elsewhere.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from data_pipeline.errors import UserError
from trainer.tracking.follow import Backoff
from trainer.tracking.points import Point
from trainer.tracking.run_view import DataSet
from trainer.tracking.uri import default_uri, redact, sqlite_file

RUN_ID_TAG = "run_id"
_MAX_METRICS, _MAX_TAGS, _MAX_TEXT = 1000, 100, 5000
_MAX_RUNS = 1000  # a page


class Tracker:
    """One experiment at one tracking URI."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Makes the experiment where there is none. Raises UserError for one that was deleted in the UI."""
        self.uri = uri
        with _first_use(uri):  # two processes creating a new database's tables at once would crash
            self.client = MlflowClient(tracking_uri=uri)
            self.experiment_id = self._experiment(experiment)
        self.cursor_name = ".mlflow-" + hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()[:12] + ".json"

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            # Beside the database, not in whatever folder the command was started from.
            database = sqlite_file(self.uri)
            location = (database.parent.absolute() / "mlartifacts" / _file_name(name)).as_uri() if database else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = self.client.get_experiment_by_name(name)  # somebody else was first
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {name!r} was deleted in the UI; restore it there, or use another --experiment."
            )
        return str(found.experiment_id)

    def find_runs(self, tags: Mapping[str, str]) -> list[Run]:
        """The active runs that have all these tags."""
        query = " and ".join(f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items())
        return list(search_runs(self.client, self.experiment_id, query))

    def open_run(self, unique_id: str, name: str, started: float | None, *, known: str | None = None) -> Run:
        """The run tagged with this id, created where there is none. `known`: MLflow's id of it, as we believe."""
        if known is not None:
            with contextlib.suppress(MlflowException):  # of a database that is gone
                run = self.client.get_run(known)
                if run.info.lifecycle_stage == "active" and run.data.tags.get(RUN_ID_TAG) == unique_id:
                    return run
        found = self.find_runs({RUN_ID_TAG: unique_id})
        if found:
            return found[0]
        start_ms = None if started is None else int(started * 1000)
        return self.client.create_run(self.experiment_id, start_ms, {RUN_ID_TAG: unique_id}, name)

    def describe(self, run: Run, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log parameters that are not there yet (they can never be changed) and tags that differ."""
        new_params = [Param(k, v[:_MAX_TEXT]) for k, v in params.items() if k not in run.data.params]
        for start in range(0, len(new_params), _MAX_TAGS):
            self.client.log_batch(run.info.run_id, params=new_params[start : start + _MAX_TAGS])
        self.set_tags(run.info.run_id, {k: v for k, v in tags.items() if run.data.tags.get(k) != v[:_MAX_TEXT]})

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, whatever they were before."""
        new = [RunTag(key, text[:_MAX_TEXT]) for key, text in tags.items()]
        for start in range(0, len(new), _MAX_TAGS):
            self.client.log_batch(run_id, tags=new[start : start + _MAX_TAGS])

    def send(self, run_id: str, points: Iterable[Point]) -> None:
        """Log points, in their order, in as few calls as MLflow allows."""
        batch: list[Metric] = []
        for point in points:
            batch.append(Metric(point.key, point.value, point.time_ms, point.step))
            if len(batch) == _MAX_METRICS:
                self.client.log_batch(run_id, metrics=batch)
                batch = []
        if batch:
            self.client.log_batch(run_id, metrics=batch)

    def log_data(self, run_id: str, sets: Iterable[DataSet]) -> None:
        """Log data sets as inputs of the run; those that it has are not logged again."""
        inputs = [DatasetInput(_dataset(data), [InputTag("mlflow.data.context", data.context)]) for data in sets]
        self.client.log_inputs(run_id, inputs)

    def steps(self, run_id: str, key: str) -> list[int]:
        """The steps that a metric has been logged at."""
        return [metric.step for metric in self.client.get_metric_history(run_id, key)]

    def upload(self, run_id: str, files: Iterable[tuple[Path, str | None]], sent: dict[str, list[int]]) -> None:
        """Upload (file, folder among the artifacts) pairs that are new or have changed since `sent` noted them."""
        for path, folder in files:
            name, mark = f"{folder or '.'}/{path.name}", file_mark(path)
            if sent.get(name) != mark:
                self.client.log_artifact(run_id, str(path), folder)
                sent[name] = mark


def connect(uri: str | None, experiment: str, *, attempts: int = 3) -> Tracker:
    """The tracker, tried a few times. Raises UserError naming the address (without credentials) and the remedy."""
    uri = uri or default_uri()
    backoff = Backoff()
    for attempt in range(attempts):
        try:
            return Tracker(uri, experiment)
        except UserError:
            raise
        except Exception as error:  # whatever the store or the network says
            if attempt == attempts - 1:
                raise UserError(
                    f"{_refusal(uri, error)} The records are safe in the run folders: start the server or give another "
                    "--tracking-uri, and try again."
                ) from None
        time.sleep(backoff.next())
    raise AssertionError("unreachable")


@contextlib.contextmanager
def require_answer(uri: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """What the store or the network say in this block becomes an error that names the address, without credentials."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise kind(_refusal(uri, error)) from None


def _refusal(uri: str, error: Exception) -> str:
    """Why a store was of no use, without credentials."""
    text = redact(str(error), uri)
    if "error code 401" in text or "error code 403" in text:
        return (
            f"MLflow at {redact(uri)} does not let us in: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, to those of somebody who may."
        )
    return f"MLflow at {redact(uri)} does not answer: {text[:300]}."


def search_runs(client: MlflowClient, experiment_id: str, query: str = "") -> Iterator[Run]:
    """All active runs of an experiment that a query finds, page by page."""
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, _MAX_RUNS, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def search_experiments(client: MlflowClient) -> Iterator[Experiment]:
    """All active experiments, page by page."""
    token: str | None = None
    while True:
        page = client.search_experiments(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _dataset(data: DataSet) -> Dataset:
    """As MLflow has it; the images' shape is stated in its format of tensors."""
    schema = None
    if data.shape:
        image = {"name": "image", "type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, *data.shape]}}
        schema = json.dumps({"mlflow_tensorspec": {"features": json.dumps([image]), "targets": None}})
    return Dataset(data.name, data.digest, data.source_type, json.dumps(data.source), schema)


def file_mark(path: Path) -> list[int]:
    """Changes whenever the file does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    database = sqlite_file(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(database.with_name(f".{database.name}.lock")):
        yield


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _quoted(value: str) -> str:
    """A value in MLflow's search language, which knows no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
