"""What a study sends beside its runs: its fits, its report, its experiment's page, and how its trials are doing."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from data_pipeline.files import write_json
from trainer.tracking.cursor import Cursor, read_cursor
from trainer.tracking.mlflow_store import RUN_ID_TAG, Tracker, exclusive
from trainer.tracking.points import EXPERIMENT_FILE, LawRun, law_points, load_law_runs
from trainer.tracking.uri import redact

STATUS_FILE, SUMMARY_FILE = "status.json", "summary.txt"  # in a study's folder, where its driver writes them
STUDY_TAG, KIND_TAG = "study", "kind"
NOTE_TAG = "mlflow.note.content"


def sync_law(folder: Path, tracker: Tracker) -> list[str]:
    """Send a `law` folder: each fit as a run of its own, and the files as those of the report's run.

    What the study's tracker holds of fits that are no more is removed. Returns MLflow's run ids.
    """
    laws = load_law_runs(folder)
    with exclusive(folder / f"{tracker.cursor_name}.lock"):
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
    if run.info.status != "FINISHED":  # else all is there: the id is made from the content
        tracker.send(run_id, law_points(law))
        for name, document in law.documents.items():
            tracker.client.log_dict(run_id, document, name)
        tracker.client.set_terminated(run_id, "FINISHED", int(law.time * 1000))
    if law.carries_files:
        path = folder / tracker.cursor_name
        cursor = read_cursor(path)
        if cursor is None or cursor.run != run_id:
            cursor = Cursor(run_id)
        tracker.upload(run_id, law_files(folder), cursor.files)
        write_json(path, asdict(cursor))
    return run_id


def law_files(folder: Path) -> list[tuple[Path, str | None]]:
    """The files of a `law` folder and the study's summary beside it, with their folders among the artifacts."""
    summary = folder.parent / SUMMARY_FILE
    shown = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    places = {path: path.parent.relative_to(folder).as_posix() for path in shown}
    found = [(path, None if place == "." else place) for path, place in places.items()]
    return [*found, *([(summary, None)] if summary.exists() else [])]


def sync_status(folder: Path, tracker: Tracker, sent: dict[str, dict[str, str]]) -> None:
    """Send what the study's driver says of its trials (`status.json`: trials: name -> texts) as tags of their runs.

    `sent`: what was sent before, by MLflow's id of the run; only what has changed is sent.
    """
    for name, texts in _said_of_trials(folder).items():
        cursor = read_cursor(folder / "trials" / name / tracker.cursor_name)
        if cursor is None:  # it has not begun, so there is no run to tag
            continue
        before = sent.setdefault(cursor.run, {})
        changed = {key: text for key, text in texts.items() if before.get(key, "") != text}
        if changed:
            tracker.set_tags(cursor.run, {key: redact(text, tracker.uri) for key, text in changed.items()})
            before |= changed


def _said_of_trials(folder: Path) -> dict[str, dict[str, str]]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return dict(json.loads((folder / STATUS_FILE).read_text())["trials"])
    return {}


def sync_experiment(folder: Path, tracker: Tracker) -> None:
    """Send the experiment's tags (`experiment.json`: saved views, a description) where they differ."""
    tags: dict[str, str] = json.loads((folder / EXPERIMENT_FILE).read_text())
    experiment_id = tracker.experiment_id
    reports = tracker.find_runs({KIND_TAG: "report"})
    ids = {"{experiment}": experiment_id, "{report}": reports[0].info.run_id if reports else ""}
    there = tracker.client.get_experiment(experiment_id).tags
    for key, value in tags.items():
        for name, found in ids.items():
            value = value.replace(name, found) if key == NOTE_TAG else value
        if there.get(key) != value:
            tracker.client.set_experiment_tag(experiment_id, key, value)
