"""What a study shows while it runs, and when nobody drives it: the status file, the table, the logs."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from watched_study import BEGAN, LARGE, SMALL, Drive, make_folder, train

from cluster.files.folder import StudyFolder
from cluster.scheduling.driver import Watcher
from cluster.scheduling.jobs import Resources, Status
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.simulate import NodeEvent
from cluster.watching import status as status_module
from cluster.watching.display import Display, fitted
from cluster.watching.logs import show_logs
from cluster.watching.names import NodeNames
from cluster.watching.status import STATUS, read_status
from cluster.watching.status_table import status_table, watch


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Path, generated_data: Path) -> StudyFolder:
    return make_folder(tmp_path, tiny_config, generated_data)


@pytest.fixture(autouse=True)
def _written_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(status_module, "_COST_FACTOR", 0.0)


class Snapshots(Watcher):
    """The status file as it was at every turn of the loop."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder, self.seen = folder, list[dict[str, Any]]()

    def tick(self, scheduler: Scheduler, nodes: Mapping[str, Resources]) -> None:
        self.seen.append(read_status(self._folder.path))


def row(table: str, trial: str) -> list[str]:
    """The cells of a trial's row that are not empty; the columns are two spaces apart."""
    line = next(line for line in table.splitlines() if line.startswith(trial))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def pretend_driver(folder: StudyFolder, **status: Any) -> dict[str, Any]:
    """A fresh status file of a driver on another host."""
    now = time.time()
    driver = {"pid": 7, "host": "elsewhere", "address": None, "since": now - 60, "now": now, "every": 2, "ended": None}
    nodes = {"n1": {"cpus": 4, "gpus": 0, "used_cpus": 3, "used_gpus": 0}}
    rest = {"running": {}, "waiting": {"trials": 1, "evaluations": 2}, "troubles": {}, "homeless": [], "trials": {}}
    said = {"driver": driver, "nodes": nodes, **rest, **status}
    (folder.path / STATUS).write_text(json.dumps(said))
    return said


def test_the_file_says_what_runs_where_and_what_became_of_it(folder: StudyFolder) -> None:
    snapshots = Snapshots(folder)
    drive = Drive(folder, {(SMALL, 1): "no_space", (LARGE, 1): "failed", (LARGE, 2): "failed"})
    drive.run(snapshots)
    first, paused = snapshots.seen[0], [s for s in snapshots.seen if s["trials"][SMALL]["state"] == "no space"]
    assert first["driver"] | {"now": 0, "every": 0} == {
        "pid": os.getpid(), "host": socket.gethostname(), "address": None, "since": BEGAN, "now": 0, "every": 0,
        "ended": None,
    }  # fmt: skip
    assert first["nodes"]["n1"] == {"cpus": 2, "gpus": 0, "used_cpus": 2, "used_gpus": 0}
    assert first["running"][SMALL] | {"nodes": []} == {
        "kind": "trial", "nodes": [], "processes": 2, "cpus": 2, "gpus": 0, "attempt": 1, "since": BEGAN,
    }  # fmt: skip
    assert first["trials"][SMALL]["state"] == "starting"
    assert paused[0]["troubles"][SMALL] == {
        "retries": 1, "status": "no_space", "why": "simulated no_space", "time": BEGAN + 100, "until": BEGAN + 105,
        "end": None,
    }  # fmt: skip
    last = read_status(folder.path)
    assert last["driver"]["ended"] == last["driver"]["now"] == BEGAN + drive.world.clock
    assert (last["running"], last["nodes"]["n1"]["used_cpus"]) == ({}, 0)
    assert last["trials"][LARGE] == {
        "state": "failed", "device": last["trials"][LARGE]["device"], "retries": "1", "progress": "0%",
        "last_trouble": "failed: simulated failed",
    }  # fmt: skip
    assert last["trials"][LARGE]["device"] in ("n1: 2 CPUs", "n2: 2 CPUs")


def test_a_job_that_no_node_can_hold_is_named(folder: StudyFolder) -> None:
    snapshots = Snapshots(folder)
    gone = (NodeEvent(10, "n1"), NodeEvent(10, "n2"), NodeEvent(10, "n3", Resources(cpus=1)))
    Drive(folder, {}, (*gone, NodeEvent(30, "n1", Resources(cpus=2)))).run(snapshots)
    homeless = [s["homeless"] for s in snapshots.seen if s["homeless"]]
    assert homeless[0] == [{"key": SMALL, "needs": "2 CPUs"}]
    assert snapshots.seen[-1]["homeless"] == []


def test_retries_are_counted_over_all_lives_of_the_driver(folder: StudyFolder) -> None:
    fate: dict[tuple[str, int], Status] = {(SMALL, 1): "lost"}
    Drive(folder, fate).run()
    Drive(folder, fate).run()  # of a simulated cluster that knows nothing of the life before
    assert read_status(folder.path)["troubles"][SMALL]["retries"] == 2


def test_a_status_that_cannot_be_written_or_made_stops_nothing(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status_module, "write_json", full)
    for trial in folder.trials:
        (folder.run_folder(trial) / "metrics.0.jsonl").write_text("damaged\n\n")
    assert Drive(folder, {}).run().num_done == 6
    assert not (folder.path / STATUS).exists()


def test_a_big_studys_file_is_written_less_often(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "_COST_FACTOR", 1e6)
    snapshots = Snapshots(folder)
    Drive(folder, {}).run(snapshots)
    assert len({s["driver"]["now"] for s in snapshots.seen}) == 1
    assert len(snapshots.seen) == 3


def test_the_table_without_any_driver(folder: StudyFolder) -> None:
    table = status_table(folder)
    assert "no driver; `run` goes on" in table
    assert row(table, SMALL)[:4] == [SMALL, "C=4", "waiting", "0"]
    train(folder, SMALL, 40)
    train(folder, LARGE, 64, done=True)
    table = status_table(folder)
    assert row(table, SMALL) == [SMALL, "C=4", "stopped", "40", "62%", "0/2"]
    assert row(table, LARGE)[2:] == ["complete", "64", "100%", "0/2"]


def test_the_table_of_a_study_that_is_driven_elsewhere(folder: StudyFolder) -> None:
    """No lock is seen, but the file is fresh."""
    train(folder, SMALL, 24, speed=8.0)
    now = time.time()
    trouble = {"retries": 3, "status": "lost", "why": "node n2 died", "time": now, "until": now + 90.4, "end": None}
    running = {"nodes": ["n1"], "cpus": 2.0, "gpus": 0.0, "kind": "trial", "processes": 2, "attempt": 1, "since": now}
    said = pretend_driver(
        folder, running={SMALL: running}, troubles={LARGE: trouble}, homeless=[{"key": "x", "needs": "8 GPUs"}],
        trials={SMALL: {"state": "running"}, LARGE: {"state": "retrying"}},
    )  # fmt: skip
    table = status_table(folder)
    assert "driven by process 7 on elsewhere since" in table
    assert "3 of 4 CPUs on 1 node in use; waiting: 1 trial, 2 evaluations; about" in table
    assert row(table, SMALL) == [SMALL, "C=4", "running", "24", "38%", "8", "0:05", "0/2", "n1: 2 CPUs"]
    assert row(table, LARGE) == [LARGE, "C=8", "retrying in 90 s", "0", "0%", "0/2", "3"]
    assert f"{LARGE}: lost: node n2 died" in table
    assert "waits for devices that no node has: x needs 8 GPUs" in table
    said["driver"]["now"] -= 60  # nothing heard for a minute
    (folder.path / STATUS).write_text(json.dumps(said))
    table = status_table(folder)
    assert "no driver since" in table
    assert row(table, SMALL)[2] == "stopped"


def test_a_status_of_a_driver_that_was_killed_is_not_believed(folder: StudyFolder) -> None:
    said = pretend_driver(folder, trials={SMALL: {"state": "running"}})
    said["driver"]["host"] = socket.gethostname()  # where its lock would be seen
    (folder.path / STATUS).write_text(json.dumps(said))
    assert row(status_table(folder), SMALL)[2] == "waiting"
    with folder.lock():  # the next driver, which has not written one yet
        table = status_table(folder)
    assert f"driven by process {os.getpid()}" in table
    assert "which starts nothing yet" in table
    assert row(table, SMALL)[2] == "waiting"


def test_what_went_wrong_stays_in_sight(folder: StudyFolder) -> None:
    Drive(folder, {(SMALL, 1): "failed", (SMALL, 2): "failed", (LARGE, 1): "lost"}).run()
    table = status_table(folder)
    assert row(table, SMALL)[2] == "failed"
    assert f"{SMALL}: failed: simulated failed" in table
    assert "will be tried again after 5 s: simulated lost" in table
    assert "driver ended: failed" in table


def test_of_very_many_trials_the_interesting_ones_are_shown(folder: StudyFolder) -> None:
    pretend_driver(folder, trials={SMALL: {"state": "waiting"}, LARGE: {"state": "running"}})
    table = status_table(folder, max_lines=1)
    assert LARGE in table
    assert SMALL not in table
    assert "and 1 waiting" in table


def test_trials_that_only_the_driver_knows_are_named(folder: StudyFolder) -> None:
    """Its study file was edited after this one was read."""
    pretend_driver(folder, trials={SMALL: {"state": "waiting"}, "channels16-seed0": {"state": "running"}})
    assert "the driver has another study file: channels16-seed0" in status_table(folder)


def test_watching_ends_when_all_is_done(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for trial in folder.trials:
        train(folder, trial, 64, done=True)
    watch(folder)
    assert "2 trials (2 complete)" in capsys.readouterr().out


def test_the_live_line_shows_what_fits() -> None:
    parts = ["first trial", "second trial", "third trial"]
    assert fitted("head", parts, 3, 80) == "head | first trial | second trial | third trial"
    assert fitted("head", parts, 3, 46) == "head | first trial | second trial | +1 more"
    assert fitted("head", parts, 3, 30) == "head | first trial | +2 more"
    assert fitted("head", parts, 3, 10) == "head | +3 "
    assert fitted("head", [], 0, 80) == "head"
    thousand = iter(str(i) for i in range(1000))
    assert fitted("head", thousand, 1000, 24) == "head | 0 | 1 | +998 more"
    assert next(thousand) == "3"  # files are read for what is shown, and for one more


def test_the_display_tells_where_trials_train_and_what_went_wrong(
    folder: StudyFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.watching.display._LOG_SECONDS", 0.0)
    drive = Drive(folder, {(SMALL, 1): "lost", (LARGE, 1): "failed", (LARGE, 2): "failed"})
    train(folder, SMALL, 32)
    train(folder, LARGE, 32, ahead=600.0)
    drive.run(Display(folder, NodeNames(drive.world)))
    printed = capsys.readouterr().out
    assert re.search(r"training   C=4     : 64 images from 16 images on n.\n", printed)
    assert "2 training, 0 evaluating, waiting: 0 trials, 0 evaluations | C=" in printed
    assert re.search(r"C=4 starting on n.", printed)  # what it says of steps is of an earlier start
    assert re.search(r"C=8 32/64 img 50% 8 img/s ETA 0:04 loss 0.500 on n.", printed)
    assert f"warning: {SMALL}: lost (simulated lost); tried again in 5 s" in printed
    assert re.search(r"training   C=4     : 64 images from 16 images on n., start 2\n", printed)
    assert f"error: {LARGE} failed after 2 starts, given up: simulated failed" in printed


def test_logs_of_several_trials_are_told_apart(folder: StudyFolder) -> None:
    (folder.run_folder(SMALL) / "log.txt").write_text("".join(f"line {i}\n" for i in range(30)) + "half a line")
    (folder.run_folder(LARGE) / "log.node1.txt").write_bytes(b"bar 1\rbar 2\n")
    shown: list[str] = []
    show_logs(folder, [], follow=False, show=shown.append)
    assert shown == [*(f"{SMALL} | line {i}" for i in range(20, 30)), f"{LARGE} node1 | bar 2"]
    shown.clear()
    show_logs(folder, [SMALL], follow=False, show=shown.append)
    assert shown == [f"line {i}" for i in range(30)]


def test_logs_are_followed_while_somebody_drives_the_study(folder: StudyFolder) -> None:
    log = folder.run_folder(SMALL) / "log.txt"
    log.write_text("first\nsec")
    shown: list[str] = []
    with folder.lock():
        reader = threading.Thread(
            target=show_logs, args=(folder, [SMALL]), kwargs={"follow": True, "show": shown.append, "seconds": 0.02}
        )
        reader.start()
        time.sleep(0.1)
        with open(log, "a") as file:
            file.write("ond\n")
        time.sleep(0.1)
        assert shown == ["first", "second"]
    reader.join(5)
    assert not reader.is_alive()
