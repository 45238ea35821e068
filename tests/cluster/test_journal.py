"""The journal of a study: what a driver's life leaves in events.jsonl, on a full disk and after a kill too."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cluster.scheduling.driver import Summary, run_jobs, waiting_trials
from cluster.scheduling.jobs import EvalJob, Job, Resources, Shape, Status, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.simulate import NodeEvent, SimulatedCluster, SimulatedTrial, simulated_eval
from cluster.scheduling.troubles import RetryPolicy
from cluster.watching.journal import EVENTS, Event, Journal, Lines, last_events, read_events
from cluster.watching.names import NodeNames
from data_pipeline.errors import UserError

TWO = Resources(cpus=2)


def evaluations(trial: str, nimg: int) -> list[EvalJob]:
    return [simulated_eval(trial, nimg, shape=Shape(Resources(cpus=1)), seconds=3)]


def drive(study: Path, world: SimulatedCluster) -> Summary:
    jobs = [trial.job for trial in world.trials.values()]
    scheduler = Scheduler(waiting_trials(jobs, world), retry=RetryPolicy(attempts=2, first_pause=5))
    journal = Journal(study, NodeNames(world), clock=lambda: 1000.0 + world.clock)
    with journal.life("toy", "auto") as note:
        summary = run_jobs(jobs, world, world, scheduler, [journal])
        note(summary)
    return summary


def world(fate: dict[tuple[str, int], Status], *events: NodeEvent) -> SimulatedCluster:
    """Two trials of 100 s with an export half-way, on two nodes; `fate` of a job's attempt."""
    shape = Shape(TWO, num_processes=2)
    jobs = [TrialJob(name, Path(name), (shape,), 100.0) for name in ("a", "b")]
    trials = {job.key: SimulatedTrial(job, ((0.5, 50), (1.0, 100))) for job in jobs}

    def ends(job: Job, attempt: int) -> Status:
        return fate.get((job.key, attempt), "done")

    return SimulatedCluster({"n1": TWO, "n2": TWO}, trials, evaluations, ends, events)


def of(events: list[Event], what: str, **about: object) -> list[Event]:
    return [e for e in events if e["event"] == what and all(e.get(k) == v for k, v in about.items())]


def test_a_life_is_told_from_its_start_to_its_end(tmp_path: Path) -> None:
    drive(tmp_path, world({}))
    events = read_events(tmp_path / EVENTS)
    first, nodes, last = events[0], events[1], events[-1]
    assert (first["event"], first["pid"], first["address"], first["last_seen"]) == (
        "driver_started", os.getpid(), "auto", None)  # fmt: skip
    assert "torch" in first["versions"]
    assert (nodes["event"], nodes["joined"]) == (
        "nodes", {"n1": {"cpus": 2, "gpus": 0}, "n2": {"cpus": 2, "gpus": 0}})  # fmt: skip
    (start,) = of(events, "started", key="a")
    assert (start["time"], start["kind"], start["attempt"], start["processes"], start["cpus"]) == (
        1000.0, "trial", 1, 2, 2)  # fmt: skip
    assert start["nodes"] in (["n1"], ["n2"])
    (end,) = of(events, "ended", key="a")
    assert (end["time"], end["status"], end["seconds"], end["message"]) == (1100.0, "done", 100.0, "")
    assert len(of(events, "ended", kind="evaluation", status="done")) == 4
    assert (last["event"], last["how"]) == ("driver_ended", "complete")


def test_troubles_are_told_with_their_reason(tmp_path: Path) -> None:
    fate: dict[tuple[str, int], Status] = {("a", 1): "lost", ("b", 1): "diverged"}
    drive(tmp_path, world(fate, NodeEvent(20, "n3", TWO), NodeEvent(30, "n3")))
    events = read_events(tmp_path / EVENTS)
    (retry,) = of(events, "retry")
    assert (retry["key"], retry["attempt"], retry["pause"], retry["status"], retry["message"]) == (
        "a", 1, 5.0, "lost", "simulated lost")  # fmt: skip
    (failure,) = of(events, "failure")
    assert (failure["key"], failure["state"], failure["message"]) == ("b", "diverged", "simulated diverged")
    assert of(events, "nodes")[-1]["lost"] == ["n3"]
    assert events[-1]["how"] == "complete"  # a diverged trial is an answer


def test_a_second_life_goes_on_in_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"driver": {"now": 900.0, "ended": None}}))
    fate: dict[tuple[str, int], Status] = {("a", 1): "failed", ("a", 2): "failed"}
    drive(tmp_path, world(fate))
    with pytest.raises(UserError):
        drive(tmp_path, world({("a", 1): "user_error"}))
    events = read_events(tmp_path / EVENTS)
    starts, ends = of(events, "driver_started"), of(events, "driver_ended")
    assert [start["last_seen"] for start in starts] == [900.0, 900.0]
    assert [end["how"] for end in ends] == ["failed", "error"]
    assert ends[1]["message"] == "a: simulated user_error"


def test_a_line_that_was_torn_by_a_kill_is_left_out_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.write_text('{"time": 1, "event": "told", "text": "x"}\n{"time": 2, "event": "to')
    assert [event["time"] for event in read_events(path)] == [1]
    Lines(path).append('{"time": 3, "event": "told", "text": "y"}')
    assert [event["time"] for event in read_events(path)] == [1, 3]
    assert [event["time"] for event in last_events(path, 1)] == [3]
    assert read_events(tmp_path / "none.jsonl") == last_events(tmp_path / "none.jsonl", 3) == []


def test_the_newest_of_a_long_journal_are_read_from_its_end(tmp_path: Path) -> None:
    lines = Lines(tmp_path / EVENTS)
    for i in range(3000):
        lines.append(json.dumps({"time": i, "event": "told", "text": "x" * 50}))
    assert [event["time"] for event in last_events(tmp_path / EVENTS, 2)] == [2998, 2999]


def test_on_a_full_disk_lines_wait_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, real, room = Lines(tmp_path / EVENTS), os.write, [25]

    def write(file: int, content: bytes) -> int:
        """As a disk does that has room for some bytes more."""
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, bytes(content[: room[0]]))
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    for i in range(3):
        lines.append(json.dumps({"time": i, "event": "told"}))
    assert len((tmp_path / EVENTS).read_bytes()) == 25  # the first line in part
    assert not lines.flush()
    room[0] = 10_000
    assert lines.flush()
    assert [event["time"] for event in read_events(tmp_path / EVENTS)] == [0, 1, 2]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder")
    assert drive(nowhere, world({})).num_done == 6
