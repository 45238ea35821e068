"""The end-of-study summary: from made journals with known figures, and from driven simulations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from watched_study import LARGE, SMALL, Drive, make_folder, train

from cluster.files.folder import StudyFolder
from cluster.watching.history import CUT_OFF, PAUSED, read_history
from cluster.watching.journal import EVENTS, Event
from cluster.watching.overhead import bound, device_time
from cluster.watching.summary import schedule, summary_text, write_summary

NODES = {"n1": {"cpus": 2, "gpus": 0}, "n2": {"cpus": 2, "gpus": 0}}


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Path, generated_data: Path) -> StudyFolder:
    return make_folder(tmp_path, tiny_config, generated_data)


def born(time: float, last_seen: float | None = None) -> list[Event]:
    first = {"time": time, "event": "driver_started", "pid": 1, "host": "h", "last_seen": last_seen}
    return [first, {"time": time, "event": "nodes", "joined": NODES, "lost": []}]


def died(time: float, how: str = "complete") -> Event:
    return {"time": time, "event": "driver_ended", "how": how, "message": ""}


def started(time: float, key: str, *, nodes: tuple[str, ...] = ("n1",), cpus: float = 2, processes: int = 2) -> Event:
    kind = "evaluation" if "/" in key else "trial"
    where = {"nodes": list(nodes), "processes": processes, "cpus": cpus, "gpus": 0, "expected": 1.0}
    return {"time": time, "event": "started", "key": key, "kind": kind, "attempt": 1, **where}


def ended(time: float, key: str, status: str = "done", *, startup: float | None = None, message: str = "") -> Event:
    kind = "evaluation" if "/" in key else "trial"
    about = {"attempt": 1, "seconds": 0.0, "startup": startup, "message": message}
    return {"time": time, "event": "ended", "key": key, "kind": kind, "status": status, **about}


def undisturbed() -> list[Event]:
    """Two trials of 80 s of training each, on two CPUs of their own; then an evaluation of one."""
    return [
        *born(1000), started(1000, SMALL), started(1000, LARGE, nodes=("n2",)),
        ended(1090, SMALL, startup=6.0), started(1090, f"{SMALL}/000000000064/k", cpus=1, processes=1),
        ended(1092, LARGE, startup=8.0), ended(1100, f"{SMALL}/000000000064/k"), died(1100),
    ]  # fmt: skip


def finished(folder: StudyFolder) -> None:
    for name in folder.trials:
        train(folder, name, 64, done=True)  # 80 s of training, says its result file


def test_an_undisturbed_study_is_told_in_a_few_lines(folder: StudyFolder) -> None:
    finished(folder)
    history = read_history(undisturbed())
    time = device_time(folder, history)
    assert time.held == 90 * 2 + 92 * 2 + 10
    assert time.own == 80 * 2 + 80 * 2 + 10
    assert time.startup == 6 * 2 + 8 * 2
    assert time.repeated == 0
    assert time.rest == time.held - time.own - time.startup == 16
    # The longest trial and its last evaluation: 80 s and 6 s of start-up, then 10 s; all work on 4 CPUs is 89.5 s.
    assert bound(folder, history) == 96
    assert summary_text(folder, history).splitlines() == [
        "the run:     1 driver, 1:40 in all; nothing had to be tried again",
        "start-up:    median 7.0 s, longest 8.0 s from the decision to the first step (2 starts, all within 10 s)",
        "cluster:     4 CPUs in the mean, 94% of their time held by jobs, 1.04 x the time that no schedule goes below",
        "overhead:    start-up 8.5% of the jobs' own time, all else that orchestration adds 4.8%",
    ]


def test_troubles_are_counted_and_explained(folder: StudyFolder) -> None:
    finished(folder)
    events = [
        *born(0), started(0, SMALL), started(0, LARGE, nodes=("n1", "n2"), cpus=1),
        ended(40, LARGE, "lost", startup=5.0, message="node n2 died"),
        {"time": 40, "event": "nodes", "joined": {}, "lost": ["n2"]},
        {"time": 40, "event": "retry", "key": LARGE, "attempt": 1, "pause": 5, "status": "lost", "message": "x"},
        started(45, LARGE, cpus=1, processes=1), ended(50, SMALL, "out_of_memory"), ended(200, LARGE, startup=12.0),
        {"time": 210, "event": "failure", "key": SMALL, "attempts": 1, "state": "failed", "message": "y"}, died(210),
    ]  # fmt: skip
    history = read_history(events)
    assert history.capacity.cpus == pytest.approx((2 * 210 + 2 * 40) / 210)
    time = device_time(folder, history)  # the large one: 40 s on two CPUs, then 155 s on one; 80 s of it are the result
    assert (time.held, time.own, time.startup, time.repeated, time.rest) == (235, 80, 22, 133, 0)
    text = summary_text(folder, history)
    assert "1 node lost; starts of jobs that did not end well: 1 node or worker lost, 1 out of memory" in text
    assert "median 8.5 s, longest 12.0 s from the decision to the first step (2 starts, 1 of them over 10 s)" in text
    assert "repeated after troubles 166.2%" in text
    rows = {line.split("  ")[0]: [c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()}
    assert rows[LARGE][1:] == [
        "2", "1 node or worker lost", "n1, n2", "2 processes on 2 nodes -> 1 process", "node n2 died"]  # fmt: skip
    assert rows[SMALL][1:4] == ["1", "1 out of memory; failed", "n1"]


def test_lives_of_the_driver_are_put_together_without_the_time_between(folder: StudyFolder) -> None:
    first = [*born(100), started(100, SMALL), started(110, LARGE, nodes=("n2",))]  # killed
    second = [*born(5000, last_seen=160), started(5001, SMALL), ended(5041, SMALL), died(5050, "stopped")]
    history = read_history([*first, *second])
    assert (history.num_lives, history.num_killed, history.makespan) == (2, 1, 110)
    found = {(start.key, start.begin, start.end, start.status) for start in history.starts}
    assert found == {(SMALL, 0, 60, CUT_OFF), (LARGE, 10, 60, CUT_OFF), (SMALL, 61, 101, "done")}
    assert sum(stay.end - stay.begin for stay in history.stays) == 2 * 110
    killed_again = read_history(first, last_seen=130)
    assert {start.end for start in killed_again.starts} == {30}


def test_what_was_stopped_on_request_is_no_trouble(folder: StudyFolder) -> None:
    finished(folder)
    first = [*born(0), started(0, SMALL), died(50, "stopped")]
    second = [*born(100), started(100, SMALL), ended(150, SMALL, startup=5.0), died(150)]
    history = read_history([*first, *second])
    assert [start.status for start in history.starts] == [PAUSED, "done"]
    time = device_time(folder, history)
    assert (time.held, time.own, time.startup, time.repeated, time.rest) == (200, 160, 10, 0, 30)
    assert "nothing had to be tried again" in summary_text(folder, history)
    assert "tried again or given up" not in summary_text(folder, history)


def test_what_a_driven_study_leaves_is_written_and_drawn(folder: StudyFolder) -> None:
    drive = Drive(folder, {(SMALL, 1): "lost"})
    drive.run()
    finished(folder)
    text = write_summary(folder)
    assert (folder.path / "summary.txt").read_text() == text + "\n"
    assert "1 node or worker lost" in text
    history = read_history(drive.journal)
    assert history.makespan == drive.world.clock
    drawn, real = schedule(folder, history).spans, drive.world.spans
    assert sorted((s.key, s.kind, s.node, s.start, s.end) for s in drawn) == sorted(
        (s.key, s.kind, s.node, s.start, s.end) for s in real)  # fmt: skip
    with Image.open(folder.law / "schedule.png") as picture:
        assert min(picture.size) > 300


def test_the_summary_is_part_of_the_report(folder: StudyFolder) -> None:
    (folder.path / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in undisturbed()))
    finished(folder)
    folder.law.mkdir()
    (folder.law / "report.txt").write_text("the laws\n")
    text = write_summary(folder)
    assert (folder.law / "report.txt").read_text() == f"the laws\n\n\n{text}\n"


def test_a_study_without_a_journal_has_no_summary(folder: StudyFolder) -> None:
    assert write_summary(folder) == ""
    (folder.path / EVENTS).write_text(json.dumps(died(3.0)) + "\n")
    assert write_summary(folder) == ""


def test_what_was_done_before_there_was_a_journal_does_not_count(folder: StudyFolder) -> None:
    finished(folder)
    only: list[dict[str, Any]] = [*born(0), started(0, f"{SMALL}/000000000064/k", cpus=1, processes=1)]
    history = read_history([*only, ended(10, f"{SMALL}/000000000064/k"), died(20)])
    assert bound(folder, history) == 10
    assert device_time(folder, history).held == 10
    half = read_history([*born(0), started(0, SMALL), ended(30, SMALL, startup=4.0), died(30)])  # of 80 s of training
    assert (device_time(folder, half).own, device_time(folder, half).rest) == (52, 0)
