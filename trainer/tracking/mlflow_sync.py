"""Sends a run folder's records to MLflow.

    python -m trainer.tracking.mlflow_sync FOLDER [--tracking-uri URI] [--experiment NAME] [--follow]

FOLDER is a run folder, or a study folder holding `trials/*` and perhaps `law`. The files are the truth and MLflow is a
view of them: sending is idempotent. A cursor file in the run folder says what was read and sent; where it is lost, the
tracker is asked; and what is sent twice all the same carries its own timestamp and is dropped by the store. A step that
an earlier life of the run has already sent is not sent again after a resume.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.tracking.cursor import Cursor, read_cursor
from trainer.tracking.follow import StopRequest, follow
from trainer.tracking.mlflow_store import (
    Tracker,
    connect,
    exclusive,
    file_mark,
)
from trainer.tracking.mlflow_study import STATUS_FILE, law_files, sync_experiment, sync_law, sync_status
from trainer.tracking.points import (
    EXPERIMENT_FILE,
    LAW_FILE,
    NUM_PARAMS,
    TRAIN_COMPUTE,
    Point,
    eval_points,
    records_by_name,
    train_points,
)
from trainer.tracking.records import (
    Evaluation,
    Place,
    TrainRecord,
    first_train_record,
    read_eval_records,
    read_evaluations,
    read_new_train_records,
)
from trainer.tracking.run_view import (
    DataSet,
    data_sets,
    public_config,
    run_config,
    run_files,
    run_params,
    run_tags,
)
from trainer.tracking.uri import default_uri, redact

_CONFIG = "config.yaml"


def sync_run(folder: Path, tracker: Tracker, *, tags: Mapping[str, str] | None = None) -> str | None:
    """Send what is new in a run folder. Returns MLflow's run id, or None while the folder holds no run yet."""
    if not (folder / "run.json").exists():
        return None
    state = _state(folder)  # before anything is read: what is written meanwhile makes another state
    about = json.loads((folder / "run.json").read_text())
    path = folder / tracker.cursor_name
    with exclusive(folder / f"{tracker.cursor_name}.lock"):
        cursor = read_cursor(path)
        started = None if cursor else _started(folder)
        run = tracker.open_run(about["id"], about["name"], started, known=cursor.run if cursor else None)
        run_id = str(run.info.run_id)
        if cursor is None or cursor.run != run_id:
            cursor = _ask_tracker(tracker, run_id, folder)
        if cursor.state == state:
            return run_id
        evaluations = read_evaluations(folder)
        config = run_config(folder)
        tracker.describe(run, run_params(config), run_tags(about, evaluations) | dict(tags or {}))
        _send_data(tracker, run_id, data_sets(about, config, evaluations), cursor)
        last = _send_points(folder, tracker, evaluations, cursor)
        _send_config(folder, tracker, public_config(config), cursor)
        tracker.upload(run_id, run_files(folder, evaluations), cursor.files)
        if (folder / "result.json").exists() and not cursor.finished:
            ended = last.time if last else (folder / "result.json").stat().st_mtime
            tracker.client.set_terminated(run_id, "FINISHED", int(ended * 1000))
            cursor.finished = True
        if "num_params" in about and NUM_PARAMS not in run.data.metrics:  # the run table sorts sizes by it
            tracker.send(run_id, [Point(NUM_PARAMS, float(about["num_params"]), 0, 0)])
        cursor.state = state
        write_json(path, asdict(cursor))
    return run_id


def _send_points(
    folder: Path, tracker: Tracker, evaluations: Sequence[Evaluation], cursor: Cursor
) -> TrainRecord | None:
    """Send new records and evaluations. Returns the last new training record."""
    records, place = read_new_train_records(folder, Place(*cursor.place))
    new = [record for record in records if record.nimg > cursor.train_nimg]
    points = [point for record in new for point in train_points(record)]
    for (key, nimg), group in eval_points(r for e in evaluations for r in e.records).items():
        if nimg not in cursor.evals.setdefault(key, []):
            points += group
            cursor.evals[key].append(nimg)
    tracker.send(cursor.run, points)
    cursor.place = list(astuple(place))
    cursor.train_nimg = max([cursor.train_nimg, *(record.nimg for record in new)])
    return new[-1] if new else None


def _send_data(tracker: Tracker, run_id: str, sets: Mapping[str, DataSet], cursor: Cursor) -> None:
    new = {key: data for key, data in sets.items() if key not in cursor.data}
    if new:
        tracker.log_data(run_id, new.values())
        cursor.data += new


def _send_config(folder: Path, tracker: Tracker, text: str, cursor: Cursor) -> None:
    """The config goes as text, not as the file, which may name a tracker with its password."""
    path = folder / _CONFIG
    if path.exists() and cursor.files.get(_CONFIG) != file_mark(path):
        tracker.client.log_text(cursor.run, text, _CONFIG)
        cursor.files[_CONFIG] = file_mark(path)


def sync_folder(folder: Path, tracker: Tracker, seen: dict[Path, Any]) -> bool:
    """One pass over a run or study folder, leaving out what has not changed since `seen`. True: all is complete."""
    runs, study = run_folders(folder), (folder / "trials").is_dir()
    for run in runs:
        state = _state(run)
        if seen.get(run) != state:
            sync_run(run, tracker, tags={"trial": run.name} if study else None)
            seen[run] = state
    if study:
        sync_status(folder, tracker, seen.setdefault(folder / STATUS_FILE, {}))
    law = folder / "law"
    if (law / LAW_FILE).exists():
        state = [[str(path), *file_mark(path)] for path, _ in law_files(law)]
        if seen.get(law) != state:
            sync_law(law, tracker)
            seen[law] = state
    page = folder / EXPERIMENT_FILE
    # Again after a fit: the description links to the report's run.
    if page.exists():
        state = [file_mark(page), (law / LAW_FILE).exists()]
        if seen.get(page) != state:
            sync_experiment(folder, tracker)
            seen[page] = state
    return bool(runs) and runs == [folder] and (folder / "result.json").exists()


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a run or study folder."""
    if (folder / "trials").is_dir():
        return sorted(path.parent for path in folder.glob("trials/*/run.json"))
    return [folder] if (folder / "run.json").exists() else []


def _ask_tracker(tracker: Tracker, run_id: str, folder: Path) -> Cursor:
    """What the tracker says it has of the run: the cursor file is missing, or speaks of another run."""
    cursor = Cursor(run_id, max(tracker.steps(run_id, TRAIN_COMPUTE), default=-1))
    cursor.evals = {name: tracker.steps(run_id, name) for name in records_by_name(read_eval_records(folder))}
    return cursor


def _started(folder: Path) -> float | None:
    """The time of the first training record."""
    first = first_train_record(folder)
    return first.time if first else None


def _state(folder: Path) -> list[Any]:
    """Changes whenever the folder has something new to send."""
    names = ("run.json", "result.json", _CONFIG, "metrics.*.jsonl", "evals/*/*.json", "evals/*.txt", "samples/*.png")
    found = (path for name in names for path in sorted(folder.glob(name)))
    return [[str(path.relative_to(folder)), *file_mark(path)] for path in found]


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
    seen: dict[Path, Any] = {}

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
