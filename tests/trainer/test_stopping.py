"""A stop request finds a process wherever it is: saving, drawing, waiting for a peer that never comes."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from ranks import run_ranks, start_ranks

from trainer.checkpoint import list_checkpoints
from trainer.exits import Exit
from trainer.processes import collective_timeout
from trainer.tracking.records import read_train_records

Job = list[subprocess.Popen[str]]


@pytest.fixture
def start(tiny_config: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    started: Job = []

    def begin(what: str, *settings: str, grace: float = 1.0, ranks: int = 1) -> Job:
        command = ["tests/trainer/stopping_run.py", what, str(grace), "--config", str(tiny_config)]
        settings = (f"run.folder={tmp_path / 'run'}", "train.export_images=[]", "train.log_every_images=8", *settings)
        started.extend(start_ranks([*command, *settings], ranks))
        return started

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().endswith(wanted):  # behind a progress bar
            return
    raise AssertionError(f"ended without {wanted!r}")


def wait_for_hang(folder: Path, job: Job) -> None:
    """Until process 0 waits for process 1, whose data stay away."""
    deadline = time.monotonic() + 120
    while not folder.exists() or not any(record.nimg >= 64 for record in read_train_records(folder)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in job)
        time.sleep(0.1)
    time.sleep(2)  # the last steps


def test_the_save_at_the_end_of_a_run_takes_its_time(start: Callable[..., Job], tmp_path: Path) -> None:
    (process,) = start("save=4", "train.budget_images=8")
    wait_for_line(process, "saving")
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text  # complete
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.prove
def test_a_save_that_the_next_one_waits_for_takes_its_time(start: Callable[..., Job], tmp_path: Path) -> None:
    (process,) = start("save=4", "train.budget_images=1000000", "train.checkpoint_every_images=8")
    wait_for_line(process, "saving")
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 3, text
    assert "000000000008" in [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]


@pytest.mark.prove
def test_who_is_stopping_draws_no_grid(start: Callable[..., Job], tmp_path: Path) -> None:
    (process,) = start("grid", "train.budget_images=1000000")
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 3, text
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000000000024"]


def test_sigterm_ends_a_process_that_waits_for_a_hanging_peer(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start("hang", "train.budget_images=1000000", ranks=2)
    wait_for_hang(tmp_path / "run", job)
    job[0].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=60)[0] for process in job]
    assert [process.returncode for process in job] == [Exit.LOST, Exit.LOST], texts
    assert "received SIGTERM, but no step ended within 1 s: not saved" in texts[0]
    assert "lost the main process" in texts[1]


@pytest.mark.prove
def test_ctrl_c_twice_ends_a_process_that_waits_for_a_hanging_peer(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start("hang", "train.budget_images=1000000", grace=1000, ranks=2)
    wait_for_hang(tmp_path / "run", job)
    for _ in range(2):
        job[0].send_signal(signal.SIGINT)
        time.sleep(0.5)  # or the second would be one with the first
    text = job[0].communicate(timeout=60)[0]
    assert job[0].returncode == 130, text


@pytest.mark.prove
def test_ctrl_c_twice_waits_for_no_save(start: Callable[..., Job]) -> None:
    (process,) = start("save=1000", "train.budget_images=1000000", "train.checkpoint_every_images=8")
    wait_for_line(process, "saving")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=40)  # not the minute that a save has where a run ends by an error
    assert process.returncode == 130


def test_a_disk_full_for_a_metric_is_told_with_the_runs_folder(start: Callable[..., Job], tmp_path: Path) -> None:
    (process,) = start("no_metrics")
    text = process.communicate(timeout=60)[0]
    assert process.returncode == Exit.NO_SPACE, text
    assert f"error: the disk is full while writing {tmp_path / 'run'}." in text
    assert "Traceback" not in text


@pytest.mark.parametrize("stage", [2, *(pytest.param(n, marks=pytest.mark.prove) for n in (0, 3))])
def test_no_groups_timeout_comes_before_the_watchdogs(tiny_config: Path, stage: int) -> None:
    text = run_ranks(["tests/trainer/timeout_ranks.py", str(tiny_config), f"engine.zero_stage={stage}"], 2)
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("timeouts")]
    assert len(lines) == 2
    assert all(len(line) >= 3 for line in lines)  # of all, DeepSpeed's, the stop agreement's
    assert {float(word) for line in lines for word in line} == {7800.0}


def test_a_collective_operation_waits_for_longer_than_the_watchdog() -> None:
    assert collective_timeout(20) == timedelta(minutes=30)  # a step may be slow all the same
    assert collective_timeout(1800) == timedelta(minutes=40)
    assert collective_timeout(0) == timedelta(days=1)
