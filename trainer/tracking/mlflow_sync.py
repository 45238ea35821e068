"""Sends a run folder's records to MLflow; the only module that imports mlflow.

    python -m trainer.tracking.mlflow_sync FOLDER [--tracking-uri URI] [--experiment NAME] [--follow]

FOLDER is a run folder, or a study folder holding `trials/*` and perhaps `law`. The files are the truth and MLflow is a
view of them: sending is idempotent. A cursor file in the run folder says what was sent; where it is lost, the tracker
is asked; and what is sent twice all the same carries its own timestamp and is dropped by the store. A step that an
earlier life of the run has already sent is not sent again after a resume.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# A tracker that does not answer must not hold us for long (we come back ourselves), and nothing is sent elsewhere.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.tracking.follow import Backoff, StopRequest, follow
from trainer.tracking.points import (
    LAW_FILE,
    TRAIN_COMPUTE,
    LawRun,
    Point,
    eval_points,
    flatten,
    law_points,
    load_law_runs,
    train_points,
)
from trainer.tracking.records import read_eval_records, read_train_records
from trainer.tracking.uri import default_uri, redact, sqlite_file

RUN_ID_TAG, STUDY_TAG, KIND_TAG = "run_id", "study", "kind"
VIEW_TAG = "mlflow.sharedViewState."
_MAX_METRICS, _MAX_TAGS, _MAX_TEXT = 1000, 100, 5000


@dataclass
class Cursor:
    """What the tracker already has of one run folder."""

    run: str  # MLflow's id of the run
    train_nimg: int = -1  # training records up to here
    evals: dict[str, list[int]] = field(default_factory=dict)  # steps by metric name
    files: dict[str, list[int]] = field(default_factory=dict)  # artifacts: [size, mtime in ns]
    finished: bool = False


class Tracker:
    """One experiment at one tracking URI."""

    def __init__(self, uri: str, experiment: str) -> None:
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
        query = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
        return list(self.client.search_runs([self.experiment_id], query, ViewType.ACTIVE_ONLY, max_results=100))

    def open_run(self, unique_id: str, name: str, started: float | None) -> Run:
        """The run tagged with this id, created where there is none."""
        found = self.find_runs({RUN_ID_TAG: unique_id})
        if found:
            return found[0]
        start_ms = None if started is None else int(started * 1000)
        return self.client.create_run(self.experiment_id, start_ms, {RUN_ID_TAG: unique_id}, name)

    def describe(self, run: Run, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log parameters that are not there yet (they can never be changed) and tags that differ."""
        new_params = [Param(k, v[:_MAX_TEXT]) for k, v in params.items() if k not in run.data.params]
        new_tags = [RunTag(k, v[:_MAX_TEXT]) for k, v in tags.items() if run.data.tags.get(k) != v[:_MAX_TEXT]]
        for start in range(0, len(new_params), _MAX_TAGS):
            self.client.log_batch(run.info.run_id, params=new_params[start : start + _MAX_TAGS])
        for start in range(0, len(new_tags), _MAX_TAGS):
            self.client.log_batch(run.info.run_id, tags=new_tags[start : start + _MAX_TAGS])

    def send(self, run_id: str, points: Iterable[Point]) -> None:
        batch: list[Metric] = []
        for point in points:
            batch.append(Metric(point.key, point.value, point.time_ms, point.step))
            if len(batch) == _MAX_METRICS:
                self.client.log_batch(run_id, metrics=batch)
                batch = []
        if batch:
            self.client.log_batch(run_id, metrics=batch)

    def steps(self, run_id: str, key: str) -> list[int]:
        return [metric.step for metric in self.client.get_metric_history(run_id, key)]

    def upload(self, run_id: str, files: Iterable[tuple[Path, str | None]], sent: dict[str, list[int]]) -> None:
        """Upload (file, folder among the artifacts) pairs that are new or have changed since `sent` noted them."""
        for path, folder in files:
            stat = path.stat()
            name, mark = f"{folder or '.'}/{path.name}", [stat.st_size, stat.st_mtime_ns]
            if sent.get(name) != mark:
                self.client.log_artifact(run_id, str(path), folder)
                sent[name] = mark


def sync_run(folder: Path, tracker: Tracker, *, tags: Mapping[str, str] | None = None) -> str | None:
    """Send what is new in a run folder. Returns MLflow's run id, or None while the folder holds no run yet."""
    if not (folder / "run.json").exists():
        return None
    about = json.loads((folder / "run.json").read_text())
    records = list(read_train_records(folder))
    evaluations = eval_points(read_eval_records(folder))
    with _exclusive(folder / f"{tracker.cursor_name}.lock"):
        run = tracker.open_run(about["id"], about["name"], records[0].time if records else None)
        run_id = run.info.run_id
        cursor = _load_cursor(folder / tracker.cursor_name, tracker, run_id, {key for key, _ in evaluations})
        tracker.describe(run, _params(folder), _tags(about) | dict(tags or {}))

        new = [record for record in records if record.nimg > cursor.train_nimg]
        tracker.send(run_id, (point for record in new for point in train_points(record)))
        for (key, nimg), points in evaluations.items():
            if nimg not in cursor.evals.get(key, []):
                tracker.send(run_id, points)
                cursor.evals.setdefault(key, []).append(nimg)
        cursor.train_nimg = max([cursor.train_nimg, *(record.nimg for record in new)])
        tracker.upload(run_id, _run_files(folder), cursor.files)
        if (folder / "result.json").exists() and not cursor.finished:
            ended = records[-1].time if records else time.time()
            tracker.client.set_terminated(run_id, "FINISHED", int(ended * 1000))
            cursor.finished = True
        write_json(folder / tracker.cursor_name, asdict(cursor))
    return str(run_id)


def sync_law(folder: Path, tracker: Tracker) -> list[str]:
    """Send a `law` folder: each fit as a run of its own, and the files as those of the report's run.

    What the study's tracker holds of fits that are no more is removed. Returns MLflow's run ids.
    """
    laws = load_law_runs(folder)
    with _exclusive(folder / f"{tracker.cursor_name}.lock"):
        run_ids = [_send_law(law, folder, tracker) for law in laws]
        # The newest fits are drawn over the trials; older ones would be drawn too. MLflow keeps them in its bin.
        for study in {law.study for law in laws}:
            for old in tracker.find_runs({STUDY_TAG: study, KIND_TAG: "law"}):
                if old.info.run_id not in run_ids:
                    tracker.client.delete_run(old.info.run_id)
    return run_ids


def _send_law(law: LawRun, folder: Path, tracker: Tracker) -> str:
    run = tracker.open_run(law.id, law.name, law.time)
    run_id = str(run.info.run_id)
    tracker.describe(run, law.params, law.tags | {RUN_ID_TAG: law.id, STUDY_TAG: law.study})
    tracker.send(run_id, law_points(law))
    for name, document in law.documents.items():
        tracker.client.log_dict(run_id, document, name)
    if law.carries_files:
        files = [(path, None) for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        tracker.upload(run_id, files, {})
    tracker.client.set_terminated(run_id, "FINISHED", int(law.time * 1000))
    return run_id


def write_views(tracker: Tracker, tags: Mapping[str, str]) -> str:
    """Write saved views and other tags of the experiment. Returns the experiment's id."""
    for key, value in tags.items():
        tracker.client.set_experiment_tag(tracker.experiment_id, key, value)
    return tracker.experiment_id


def saved_views(uri: str) -> list[tuple[str, str, str, str]]:
    """The saved views of every experiment as (experiment, its id, key, name)."""
    found = []
    for experiment in MlflowClient(tracking_uri=uri).search_experiments():
        for tag, value in experiment.tags.items():
            if tag.startswith(VIEW_TAG):
                key = tag.removeprefix(VIEW_TAG)
                found.append((experiment.name, str(experiment.experiment_id), key, json.loads(value)["name"]))
    return found


def sync_folder(folder: Path, tracker: Tracker, seen: dict[Path, tuple[Any, ...]]) -> bool:
    """One pass over a run or study folder, leaving out what has not changed since `seen`. True: all is complete."""
    runs = run_folders(folder)
    for run in runs:
        state = _state(run)
        if seen.get(run) != state:
            sync_run(run, tracker)
            seen[run] = state
    law = folder / "law"
    if (law / LAW_FILE).exists() and seen.get(law) != (state := ((law / LAW_FILE).stat().st_mtime_ns,)):
        sync_law(law, tracker)
        seen[law] = state
    return bool(runs) and runs == [folder] and (folder / "result.json").exists()


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a run or study folder."""
    if (folder / "trials").is_dir():
        return sorted(path.parent for path in folder.glob("trials/*/run.json"))
    return [folder] if (folder / "run.json").exists() else []


def _params(folder: Path) -> dict[str, str]:
    path = folder / "config.yaml"
    return flatten(yaml.safe_load(path.read_text())) if path.exists() else {}


def _tags(about: Mapping[str, Any]) -> dict[str, str]:
    names = ("seed", "num_params", "flops_per_image", "data_fingerprint")
    return {name: str(about[name]) for name in names if name in about} | {
        KIND_TAG: "trial",
        **{str(key): str(value) for key, value in about.get("tags", {}).items()},
    }


def _run_files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    if (folder / "config.yaml").exists():
        yield folder / "config.yaml", None
    yield from ((path, "samples") for path in sorted(folder.glob("samples/*.png")))
    if (folder / "evals" / "metrics.txt").exists():
        yield folder / "evals" / "metrics.txt", "evals"
    for result in sorted(folder.glob("evals/*/*.json")):  # its pictures and arrays were there before it
        name = json.loads(result.read_text()).get("name", result.stem)
        yield from ((path, f"evals/{result.parent.name}/{name}") for path in sorted(result.with_suffix("").glob("*")))


def _load_cursor(path: Path, tracker: Tracker, run_id: str, eval_keys: set[str]) -> Cursor:
    """The cursor file, or what the tracker says where the file is missing or speaks of another run."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        cursor = Cursor(**json.loads(path.read_text()))
        if cursor.run == run_id:
            return cursor
    return Cursor(
        run=run_id,
        train_nimg=max(tracker.steps(run_id, TRAIN_COMPUTE), default=-1),
        evals={key: tracker.steps(run_id, key) for key in eval_keys},
    )


def _state(folder: Path) -> tuple[Any, ...]:
    """Changes whenever the folder has something new to send."""
    names = ("run.json", "result.json", "metrics.*.jsonl", "evals/*/*.json", "evals/*.txt", "samples/*.png")
    found = (path for name in names for path in sorted(folder.glob(name)))
    return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path in found for stat in [path.stat()])


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
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
    with _exclusive(database.with_name(f".{database.name}.lock")):
        yield


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
                    f"MLflow at {redact(uri)} does not answer: {redact(str(error), uri)[:300]}. The records are "
                    "safe in the run folders: start the server or give another --tracking-uri, and try again."
                ) from None
        time.sleep(backoff.next())
    raise AssertionError("unreachable")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking.mlflow_sync", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder, or a study folder holding trials/*")
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, else sqlite in runs/mlflow.db")
    parser.add_argument("--experiment", help="default: the folder's name for a study, 'runs' for a run")
    parser.add_argument("--follow", action="store_true", help="keep sending until the run is complete or we are ended")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder; give a run folder or a study folder.")
    study = (args.folder / "trials").is_dir()
    experiment = args.experiment or (args.folder.resolve().name if study else "runs")
    uri = args.tracking_uri or default_uri()
    if args.follow:
        _follow(args.folder, uri, experiment)
        return 0
    if not run_folders(args.folder):
        raise UserError(f"{args.folder} holds no run (run.json) and no study (trials/*/run.json).")
    tracker = connect(uri, experiment)
    sync_folder(args.folder, tracker, {})
    print(f"sent to MLflow at {redact(uri)}, experiment {experiment!r}")
    return 0


def _follow(folder: Path, uri: str, experiment: str) -> None:
    tracker: Tracker | None = None
    seen: dict[Path, tuple[Any, ...]] = {}

    def one_pass() -> bool:
        nonlocal tracker
        tracker = tracker or Tracker(uri, experiment)
        return sync_folder(folder, tracker, seen)

    def report(error: Exception | None) -> None:
        where = f"MLflow at {redact(uri)}"
        if error is None:
            print(f"{where} answers again", file=sys.stderr, flush=True)
        else:
            text = " ".join(redact(str(error), uri).split())[:300]
            print(
                f"warning: {where} cannot be written ({text}); training goes on, the records are kept in {folder} and "
                "will be sent when it answers",
                file=sys.stderr,
                flush=True,
            )

    follow(one_pass, report=report, stop=StopRequest())


if __name__ == "__main__":
    run_cli(main)
