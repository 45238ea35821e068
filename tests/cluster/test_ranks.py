"""The processes of a trial: exit codes, stopping, locks. A stand-in script takes the trainer's place."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import cluster.launch.ranks as module
from cluster.launch.ranks import Ranks, RanksSpec, classify, wait_for_lock

SCRIPT = """
import os, signal, sys, time
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], "threads", os.environ["OMP_NUM_THREADS"],
      "gpus", repr(os.environ["CUDA_VISIBLE_DEVICES"]), flush=True)
def on_term(*_):
    sys.exit(3)
plan = open(os.path.join(os.path.dirname(sys.argv[2]), "plan")).read().split()[int(rank)]
signal.signal(signal.SIGTERM, signal.SIG_IGN if plan == "deaf" else on_term)
if plan == "crash":
    time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)
if plan == "mistake":
    print("error: train.lr=-1: must be positive\\n  set it right", file=sys.stderr); sys.exit(2)
if plan in ("wait", "deaf"):
    print("ready", flush=True); time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    (root / "trainer").mkdir(parents=True)
    (root / "trainer" / "run.py").write_text(SCRIPT)
    monkeypatch.setattr(module, "ROOT", root)
    folder = tmp_path / "run"
    folder.mkdir()
    started: list[Ranks] = []

    def begin(*plan: str) -> Ranks:
        (folder / "plan").write_text(" ".join(plan))
        ranks = Ranks(RanksSpec(folder, len(plan), cpus=4, gpus=0))
        started.append(ranks)
        return ranks

    yield begin
    for ranks in started:
        ranks.stop(0.1)


def finish(ranks: Ranks, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    while (code := ranks.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return code


def until(ranks: Ranks, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in ranks.output():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_get_their_place_their_share_and_no_device_that_is_not_theirs(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # as containers often set it: a line is one write all the same
    for _ in range(3):
        ranks = start("end", "end")
        assert finish(ranks) == 0
        assert sorted(ranks.output().splitlines()) == [f"rank {rank} of 2 threads 2 gpus ''" for rank in "01"]


def test_a_crash_of_one_ends_the_other_and_is_named(start) -> None:  # type: ignore[no-untyped-def]
    ranks = start("wait", "crash")
    code = finish(ranks)
    assert code == -signal.SIGKILL
    assert classify(code, ranks.output())[0] == "failed"
    assert "SIGKILL" in classify(code, ranks.output())[1]


def test_a_mistake_carries_its_message(start) -> None:  # type: ignore[no-untyped-def]
    ranks = start("mistake", "wait")
    status, message = classify(finish(ranks), ranks.output())
    assert status == "user_error"
    assert message.startswith("train.lr=-1: must be positive\n  set it right")


def test_a_message_is_found_behind_another_processes_progress_bar() -> None:
    status, message = classify(2, "RuntimeError: x\n  5%|#  | 8/160 [00:01<00:19]error: train.lr=-1\n  remedy\n")
    assert (status, message) == ("user_error", "train.lr=-1\n  remedy")
    assert classify(1, "RuntimeError: x\n")[1] == "exit code 1: RuntimeError: x"


def test_stopping_lets_them_save(start) -> None:  # type: ignore[no-untyped-def]
    ranks = start("wait")
    until(ranks, "ready")
    ranks.stop()
    assert classify(finish(ranks), ranks.output())[0] == "stopped"


def test_the_deaf_are_killed_after_the_grace(start) -> None:  # type: ignore[no-untyped-def]
    ranks = start("deaf")
    until(ranks, "ready")
    began = time.monotonic()
    ranks.stop(0.5)
    assert 0.4 < time.monotonic() - began < 5
    assert finish(ranks) == -signal.SIGKILL


def test_only_this_starts_output_is_judged(start) -> None:  # type: ignore[no-untyped-def]
    finish(start("mistake"))
    second = start("end")
    assert finish(second) == 0
    assert "error" not in second.output()


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, "done"), (2, "user_error"), (3, "stopped"), (5, "diverged"), (6, "out_of_memory"), (7, "lost"),
     (8, "no_space"), (1, "failed"), (4, "failed"), (-9, "failed")],
)  # fmt: skip
def test_each_exit_code_has_its_meaning(code: int, status: str) -> None:
    assert classify(code, "error: this is why")[0] == status


def test_a_process_killed_for_want_of_memory_is_told_from_one_that_was_killed() -> None:
    assert classify(-9, "", ran_out_of_memory=True)[0] == "out_of_memory"
    assert classify(-15, "", ran_out_of_memory=True)[0] == "failed"


def test_what_explains_the_others_comes_first() -> None:
    assert module._one_code([4, 6, -9]) == 6
    assert module._one_code([4, -9, 3]) == -9
    assert module._one_code([4, 1, 0]) == 1
    assert module._one_code([3, 4]) == 4
    assert module._one_code([0, 3]) == 3


def test_a_lost_process_is_tried_again_and_named() -> None:
    status, message = classify(4, "  5%|#  | 8/160\nerror: process 1 (pid 7 on h) died. This job ends.\n")
    assert (status, message) == ("failed", "lost a process: process 1 (pid 7 on h) died. This job ends.")
    assert classify(4, "")[0] == "failed"


def test_the_lock_of_an_earlier_life_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    threading.Timer(0.7, os.close, [holder]).start()
    began = time.monotonic()
    wait_for_lock(path, 10)
    assert 0.5 < time.monotonic() - began < 5
    wait_for_lock(tmp_path / "none", 10)  # nobody was ever there
