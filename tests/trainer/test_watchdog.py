"""One process dies, freezes, hangs or errs: all end, the cause is named once, nobody is left.

First with stand-ins for the processes, which start at once; then with the trainer itself.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT, start_ranks

import trainer.watchdog as module
from trainer.exits import Exit
from trainer.ports import free_port
from trainer.tracking.records import read_train_records
from trainer.watchdog import Entry, Hub, Member, Place, Roll, Verdict, _listen, lost_a_peer

Job = list[subprocess.Popen[str]]


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for process in (p for job in started for p in job):
        process.kill()  # also ends a stopped one
        process.wait()


@pytest.fixture
def start(jobs: list[Job], tmp_path: Path) -> Callable[..., Job]:
    def begin(*plans: str, hang: float = 0, dead: float = 20) -> Job:
        script = str(ROOT / "tests" / "trainer" / "watchdog_scenario.py")
        job = start_ranks([script, str(tmp_path / "rendezvous"), str(hang), str(dead), *plans], len(plans))
        jobs.append(job)
        for process in job:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return job

    return begin


def finish(job: Job, seconds: float = 60) -> tuple[list[int], list[str]]:
    """Exit codes and outputs; all must end within a deadline far above what they need."""
    texts = [process.communicate(timeout=seconds)[0] for process in job]
    return [process.returncode for process in job], texts


def told(texts: list[str], *words: str) -> None:
    """Exactly one process tells the cause, in these words."""
    (text,) = [text for text in texts if "error: " in text]
    assert len(re.findall(r"\berror: ", text)) == 1
    assert not [word for word in words if word not in text], text
    assert not any("Traceback" in text for text in texts), texts


def test_an_orderly_end_alarms_nobody(start: Callable[..., Job]) -> None:
    job = start("compute,finish", "compute,finish", "compute,finish")
    assert finish(job) == ([0, 0, 0], ["", "", ""])


def test_a_dead_process_is_named_and_all_end(start: Callable[..., Job]) -> None:
    job = start("compute,wait", "wait", "save,wait")
    time.sleep(0.5)
    job[2].kill()
    codes, texts = finish(job)
    assert codes == [Exit.LOST, Exit.LOST, -signal.SIGKILL]
    told(texts, f"process 2 (pid {job[2].pid} on {socket.gethostname()}) died, last seen in")


def test_survivors_say_that_they_lost_the_main_process(start: Callable[..., Job]) -> None:
    job = start("wait", "wait", "wait")
    job[0].kill()
    codes, texts = finish(job)
    assert codes == [-signal.SIGKILL, Exit.LOST, Exit.LOST]
    for text in texts[1:]:
        assert text.count(f"error: lost the main process, process 0 (pid {job[0].pid} on") == 1
        assert "it died" in text


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_named_and_killed(start: Callable[..., Job], frozen: int) -> None:
    job = start("wait", "wait", dead=4)
    job[frozen].send_signal(signal.SIGSTOP)
    codes, texts = finish(job)
    assert codes[frozen] == -signal.SIGKILL  # it could not end itself
    assert codes[1 - frozen] == Exit.LOST
    told(texts, f"process {frozen} (pid {job[frozen].pid}", "has not answered for 4 s", "frozen")


def test_a_process_whose_interpreter_is_blocked_is_killed(start: Callable[..., Job]) -> None:
    codes, texts = finish(start("wait", "blocked", dead=4))
    assert codes == [Exit.LOST, -signal.SIGKILL]
    told(texts, "process 1", "frozen")


@pytest.mark.prove
def test_a_job_that_was_suspended_as_a_whole_goes_on(start: Callable[..., Job]) -> None:
    job = start("step", "step", dead=3, hang=3)
    for process in job:
        process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    for process in job:
        process.send_signal(signal.SIGCONT)
    assert finish(job) == ([0, 0], ["", ""])


@pytest.mark.parametrize(
    ("plans", "behind"),
    [
        (("compute,wait", "late,wait", "compute,wait"), "behind is process 1 ("),
        (("compute,wait", "compute,wait", "save,wait"), "behind is process 2 ("),
        (("compute,wait", "compute,wait", "compute,wait"), "none is behind the others: 3 in 'compute' at 8 images"),
        (("save,wait",), "none is behind the others: 1 in 'save' at 8 images"),
    ],
)
def test_a_hang_names_who_is_behind_and_shows_where(
    start: Callable[..., Job], plans: tuple[str, ...], behind: str
) -> None:
    codes, texts = finish(start(*plans, hang=1))
    assert codes == [Exit.LOST] * len(plans)
    text = "".join(texts)
    assert text.count("error: no process has moved on for 1 s (engine.hang_seconds)") == 1
    assert behind in text
    assert text.count("stands here:") == 1
    assert "time.sleep(120)" in text  # the line at which its main thread stands


def test_moving_on_is_no_hang(start: Callable[..., Job]) -> None:
    assert finish(start("step", "step", hang=2))[0] == [0, 0]


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_that_one_process_met_ends_the_job_as_a_mistake(start: Callable[..., Job], mistaken: int) -> None:
    plans = ["wait", "wait"]
    plans[mistaken] = "mistake"
    codes, texts = finish(start(*plans))
    assert codes == [2, 2]
    if mistaken:  # what the main process met it prints itself (trainer/run.py)
        told(texts, "process 1 (", "failed: sample 7 is damaged")


def test_a_crash_of_one_ends_the_others(start: Callable[..., Job]) -> None:
    codes, texts = finish(start("wait", "wait", "crash"))
    assert codes == [Exit.LOST, Exit.LOST, 1]
    told(texts, "process 2 (", "RuntimeError: boom")


def test_an_error_that_all_meet_is_theirs_to_tell(start: Callable[..., Job]) -> None:
    assert finish(start("mistake", "mistake")) == ([2, 2], ["", ""])


def test_who_only_notices_that_a_peer_is_gone_waits_for_the_cause(start: Callable[..., Job]) -> None:
    job = start("torn", "torn", "wait")
    job[2].kill()
    codes, texts = finish(job)
    assert codes[:2] == [Exit.LOST, Exit.LOST]
    told(texts, "process 2 (", "died")


def test_strangers_are_not_heard(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start("step", "step")
    port = 0
    for line in Path(f"/proc/{job[0].pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        inode = f"socket:[{fields[9]}]"
        mine = any(os.readlink(f) == inode for f in Path(f"/proc/{job[0].pid}/fd").iterdir() if f.is_symlink())
        if fields[3] == "0A" and mine:  # it listens
            address, _, hexadecimal = fields[1].partition(":")
            assert address == "0100007F"  # a job on one machine: loopback
            port = int(hexadecimal, 16)
    for line in (b'{"token": "guess", "member": {"rank": 1}}\n{"bye": ["gone", 2]}\n', b"GET / HTTP/1.1\n\n", b"[]\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(line)
            assert stranger.recv(100) == b""  # shown the door
    assert finish(job) == ([0, 0], ["", ""])


def test_the_port_is_at_the_masters_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bound in (("127.0.0.1", "127.0.0.1"), ("192.0.2.1", "::"), ("some-name", "::")):
        monkeypatch.setenv("MASTER_ADDR", name)
        known = lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1" if name == "some-name" else name, 0))]  # noqa: B023, E731
        monkeypatch.setattr(socket, "getaddrinfo", known)
        with _listen() as server:
            assert server.getsockname()[0] in (bound, bound.replace("::", "0.0.0.0"))
    # 192.0.2.1 is no address of this machine; some-name leads to a loopback here, and elsewhere from other hosts.


def test_the_hub_judges_at_its_beats_and_when_one_is_gone_but_not_after_every_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[int] = []

    class Counted(Roll):
        def judge(self) -> Verdict | None:
            judged.append(len(lines))
            return super().judge()

    lines: list[bytes] = []
    exits: list[int] = []
    monkeypatch.setattr(module, "BEAT_SECONDS", 3600.0)
    monkeypatch.setattr(module, "_exit", exits.append)
    monkeypatch.setattr(module, "_end_without_fail", exits.append)
    member = Member(1, "elsewhere", 1, "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub = Hub(Member.me(0), Counted(2, hang_seconds=0, dead_seconds=20), server, "token")
        hub.start()
        with socket.create_connection(server.getsockname(), timeout=60) as peer, peer.makefile("rb") as answers:
            peer.sendall(json.dumps({"token": "token", "member": asdict(member)}).encode() + b"\n")
            for _ in range(200):
                peer.sendall(json.dumps({"place": asdict(Place())}).encode() + b"\n")
                lines.append(answers.readline())
        hub.join(60)
    assert lines == [b"{}\n"] * 200
    assert judged == [200]  # when it had gone
    assert exits == [Exit.LOST, Exit.LOST]


def test_only_what_a_collective_operation_raises_is_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_a_peer(RuntimeError("[gloo/transport/tcp/pair.cc:533] Connection closed by peer [127.0.0.1]:1"))
    assert lost_a_peer(torch.distributed.DistBackendError("NCCL: remote process exited or there was a network error"))
    assert not lost_a_peer(BrokenPipeError(errno.EPIPE, "Broken pipe"))  # `| head`
    assert not lost_a_peer(OSError(errno.ETIMEDOUT, "Connection timed out", "/nfs/metrics.0.jsonl"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not lost_a_peer(RuntimeError("Connection closed by peer"))


def test_one_silent_process_of_many_is_found() -> None:
    roll = Roll(64, hang_seconds=100, dead_seconds=20)
    roll.entries = [Entry(Member(rank, f"host{rank // 8}", 1, ""), Place(8, "compute")) for rank in range(64)]
    for _ in range(21):
        assert roll.judge() is None
        roll.beat()
        for entry in roll.entries[1:]:
            entry.silent = 0 if entry is not roll.entries[42] else entry.silent
    verdict = roll.judge()
    assert verdict is not None
    assert verdict.frozen == roll.entries[42].member
    assert "process 42 (pid 1 on host5)" in verdict.cause


# ---- the trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(jobs: list[Job], tiny_config: Path, tmp_path: Path) -> Callable[..., Job]:
    def begin(*settings: str, script: str = "tests/trainer/impatient_run.py") -> Job:
        folder = tmp_path / "run"
        job = start_ranks(
            [script, "--config", str(tiny_config), f"run.folder={folder}", "train.budget_images=1000000",
             "train.log_every_images=8", "train.export_images=[]", *settings], 2,
        )  # fmt: skip
        jobs.append(job)
        deadline = time.monotonic() + 120
        while not folder.exists() or len(list(read_train_records(folder))) < 3:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in job), finish(job)
            time.sleep(0.1)
        return job

    return begin


def families(job: list[Any]) -> set[int]:
    """The processes that the ranks have started, and theirs."""
    found: set[int] = {process.pid for process in job}
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 30
    while left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.prove),
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.prove),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.prove),
    ],
)
def test_real_training_ends_as_a_whole(train: Callable[..., Job], victim: int, number: signal.Signals) -> None:
    job = train()
    pids = families(job)
    job[victim].send_signal(number)
    codes, texts = finish(job)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == Exit.LOST, texts
    how = "frozen" if number == signal.SIGSTOP else "died"
    told(texts[1 - victim : 2 - victim], f"process {victim} (pid {job[victim].pid}", how)
    gone(pids)


@pytest.mark.prove
def test_real_training_that_hangs_shows_where(train: Callable[..., Job]) -> None:
    job = train("engine.hang_seconds=20", script="tests/trainer/hanging_run.py")
    codes, texts = finish(job)
    assert codes == [Exit.LOST, Exit.LOST]
    told(texts, "no process has moved on", "behind is process 1 (", "in 'data'")
    assert "for inputs in steps" in texts[1]


@pytest.mark.prove
def test_sigterm_to_the_deepspeed_command_reaches_the_training_behind_it(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [*command, "--master_port", str(free_port()), "trainer/run.py", "--config", str(tiny_config),
             f"run.folder={folder}", "train.budget_images=1000000", "train.log_every_images=8"],
            cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not folder.exists() or len(list(read_train_records(folder))) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            pids = families([launcher])
            assert len(pids) >= 4  # deepspeed, its launch.py, two of ours
        finally:
            launcher.terminate()
            launcher.wait()
        gone(pids)
    assert "stopped (the launcher died)" in (tmp_path / "log").read_text()
    assert list((folder / "checkpoints").glob("0*"))  # saved
