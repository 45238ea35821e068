"""What a study's driver says of its trials arrives as tags of their runs; its summary among the report's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tracking_records import write_records

from trainer.tracking.mlflow_store import Tracker
from trainer.tracking.mlflow_study import law_files
from trainer.tracking.mlflow_sync import sync_folder

RUNNING = {"state": "running", "progress": "40%", "device": "n1: 2 CPUs", "retries": "0", "last_trouble": ""}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of two trials, of which one has begun."""
    study = tmp_path / "study"
    for name in ("c8", "c16"):
        (study / "trials" / name).mkdir(parents=True)
    run = study / "trials" / "c8"
    (run / "run.json").write_text(json.dumps({"id": "unique", "name": "C=8"}))
    write_records(run, 0, range(100, 300, 100), time=1000.0)
    return study


def say(study: Path, **trials: dict[str, str]) -> None:
    (study / "status.json").write_text(json.dumps({"driver": {}, "trials": trials}))


def tags(tracker: Tracker) -> dict[str, str]:
    (run,) = tracker.find_runs({"run_id": "unique"})
    return {key: text for key, text in run.data.tags.items() if key in RUNNING}


def test_only_what_has_changed_is_sent(study: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, str]] = []
    set_tags = tracker.set_tags

    def count(run_id: str, new: dict[str, str]) -> None:
        calls.append(new)
        set_tags(run_id, new)

    seen: dict[Path, Any] = {}
    sync_folder(study, tracker, seen)  # nobody drives it
    assert tags(tracker) == {}
    monkeypatch.setattr(tracker, "set_tags", count)
    say(study, c8=RUNNING, c16=RUNNING | {"state": "waiting"})
    sync_folder(study, tracker, seen)
    sync_folder(study, tracker, seen)
    assert tags(tracker) == {key: text for key, text in RUNNING.items() if text}
    assert len(calls) == 1
    trouble = {"state": "retrying", "retries": "1", "last_trouble": "lost: node n1 died"}
    say(study, c8=RUNNING | trouble)
    sync_folder(study, tracker, seen)
    assert tags(tracker) == RUNNING | trouble
    assert calls[1:] == [trouble]


def test_a_trial_that_begins_later_gets_its_tags_then(study: Path, tracker: Tracker) -> None:
    say(study, c16=RUNNING)
    seen: dict[Path, Any] = {}
    sync_folder(study, tracker, seen)
    (study / "trials" / "c16" / "run.json").write_text(json.dumps({"id": "second", "name": "C=16"}))
    sync_folder(study, tracker, seen)
    (run,) = tracker.find_runs({"run_id": "second"})
    assert run.data.tags["state"] == "running"


def test_a_damaged_status_is_left_aside_and_no_password_is_sent(study: Path, tracker: Tracker) -> None:
    (study / "status.json").write_text('{"trials": ')
    sync_folder(study, tracker, {})
    assert tags(tracker) == {}
    say(study, c8=RUNNING | {"last_trouble": "failed: https://user:secret99@host refused"})
    sync_folder(study, tracker, {})
    assert tags(tracker)["last_trouble"] == "failed: https://***@host refused"


def test_the_studys_summary_is_among_the_laws_files(study: Path) -> None:
    (study / "law").mkdir()
    (study / "law" / "schedule.png").write_bytes(b"png")
    assert [(path.name, place) for path, place in law_files(study / "law")] == [("schedule.png", None)]
    (study / "summary.txt").write_text("all went well")
    names = [(path.name, place) for path, place in law_files(study / "law")]
    assert names == [("schedule.png", None), ("summary.txt", None)]
