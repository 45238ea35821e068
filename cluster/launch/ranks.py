"""The processes of one trial on one node: started on their devices, watched, stopped. Standard library only.

Each gets torch's environment variables, a port to meet at, and its share of the processors. They watch their parent
themselves: whoever kills the process that started them ends them too, after they have saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.scheduling.jobs import Status
from data_pipeline.files import is_locked
from trainer.exits import Exit
from trainer.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 120.0  # from SIGTERM to SIGKILL; the trainer ends itself after 25, or when what it saves is saved
_LOCK_SECONDS = 60.0
_TAIL_BYTES = 8192
_PROGRESS_BAR = re.compile(r"\d%\|")


@dataclass(frozen=True)
class RanksSpec:
    """How to start them."""

    folder: Path  # the run folder, with trial.yaml in it
    num_processes: int  # on all nodes
    cpus: float  # of those on this node
    gpus: float
    node: int = 0  # this one among the trial's
    num_nodes: int = 1
    master: str = "127.0.0.1"  # the address of the first one

    @property
    def num_here(self) -> int:
        return self.num_processes // self.num_nodes

    @property
    def log(self) -> Path:
        """Hosts that share a folder cannot append to one file."""
        return self.folder / ("log.txt" if self.node == 0 else f"log.node{self.node}.txt")


class Ranks:
    """The running processes of one trial on this node."""

    def __init__(self, spec: RanksSpec, port: int | None = None) -> None:
        """Start them. `port`: on the first node, where all of them meet; default: a free one here."""
        self._spec = spec
        if spec.node == 0:
            wait_for_lock(spec.folder / "run.lock", _LOCK_SECONDS)
        first, port = spec.node * spec.num_here, free_port() if port is None else port
        with open(spec.log, "ab") as log:
            where = "" if spec.num_nodes == 1 else f" on each of {spec.num_nodes} nodes"
            host = socket.gethostname()
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {host}: {spec.num_here} process(es){where}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._processes = [self._start(first, local, port, log.fileno()) for local in range(spec.num_here)]

    def _start(self, first: int, local: int, port: int, log: int) -> subprocess.Popen[bytes]:
        spec = self._spec
        environment = os.environ | {
            "RANK": str(first + local), "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(spec.num_processes), "LOCAL_WORLD_SIZE": str(spec.num_here),
            "MASTER_ADDR": spec.master, "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(max(1, int(spec.cpus // spec.num_here))),
        }  # fmt: skip
        environment.pop("PYTHONUNBUFFERED", None)  # else each piece of a line is a write, and two ranks' lines mix
        if not self._spec.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # it was given none: it must not take one
        command = [sys.executable, str(ROOT / "trainer" / "run.py"), "--config", str(self._spec.folder / "trial.yaml")]
        return subprocess.Popen(
            command, env=environment, cwd=os.getcwd(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C at the driver's terminal is the driver's to hand on
        )  # fmt: skip

    def poll(self) -> int | None:
        """None while all is well; else one exit code for all: 0, or that of the process that failed first.

        When one fails, the others (who would wait for it for ever) are stopped.
        """
        codes = [process.poll() for process in self._processes]
        if all(code is not None for code in codes):
            return _one_code([code for code in codes if code is not None])
        if any(code not in (None, 0) for code in codes):
            self.stop()
            ended = [process.returncode for process in self._processes]
            # How the others end now tells only where they had a trouble of their own.
            return _one_code([code for before, code in zip(codes, ended, strict=True) if before or code > 0])
        return None

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Ask all to save and end; kill those that have not after `grace` seconds."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + grace
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()

    def output(self) -> str:
        """The end of what this start wrote to the log."""
        with open(self._spec.log, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _TAIL_BYTES))
            return log.read().decode(errors="replace")


# What the trainer's exit codes mean to a study. A folder or port in use is free again when whoever lost it has ended.
_STATUS: dict[int, Status] = {
    Exit.FINISHED: "done", Exit.USER_ERROR: "user_error", Exit.STOPPED: "stopped", Exit.DIVERGED: "diverged",
    Exit.OUT_OF_MEMORY: "out_of_memory", Exit.BUSY: "lost", Exit.NO_SPACE: "no_space",
}  # fmt: skip


def classify(code: int, output: str, *, ran_out_of_memory: bool = False) -> tuple[Status, str]:
    """What an exit code means, and the message that goes with it.

    `ran_out_of_memory`: the system has ended a process here for want of memory meanwhile.
    """
    if code == Exit.FINISHED:
        return "done", ""
    message = _said(output)
    if code == Exit.STOPPED:
        return "stopped", "stopped before its end"
    if code == Exit.NO_SPACE:
        return "no_space", first_sentence(message) or "the disk is full"  # and the log may be on it
    if code in _STATUS:
        return _STATUS[code], message or _last_line(output)
    if code == Exit.LOST:  # in each other's reach, so one of them said why
        return "failed", f"lost a process: {message or 'the log does not say why'}"
    if code == -signal.SIGKILL and ran_out_of_memory:
        return "out_of_memory", "the host ran out of memory and the system killed a process"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
        return "failed", f"{how}: {message}" if message else how
    return "failed", f"exit code {code}: {message or _last_line(output)}"


def first_sentence(message: str) -> str:
    """What is wrong, without what the user of a single command should do."""
    return message.partition(". ")[0]


def oom_kills() -> int:
    """How many processes the system has ended for want of memory: in this container, and on this machine."""
    total = 0
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", Path(path).read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total


def started_at(folder: Path) -> float | None:
    """When the run's newest life took its first step, in seconds since 1970."""
    try:
        return float(json.loads((folder / "started.json").read_text())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def wait_for_lock(path: Path, seconds: float) -> None:
    """Wait until nobody holds a run folder: processes of an earlier life may still be saving."""
    deadline = time.monotonic() + seconds
    while path.exists() and is_locked(path) and time.monotonic() < deadline:
        time.sleep(0.5)


def _one_code(codes: list[int]) -> int:
    """What explains the others: a mistake or its like, then a signal, then a crash; who only lost a peer comes last."""
    causes = (Exit.USER_ERROR, Exit.DIVERGED, Exit.OUT_OF_MEMORY, Exit.NO_SPACE, Exit.BUSY)
    symptoms = (Exit.LOST, Exit.STOPPED, Exit.FINISHED)
    signals = sorted(code for code in codes if code < 0)
    others = [code for code in codes if code >= 0 and code not in (*causes, *symptoms)]
    return next(code for code in (*causes, *signals, *others, *symptoms) if code in codes)


def _said(output: str) -> str:
    """The last `error: ...` message with its following lines; nothing where there is none."""
    # Another process's progress bar may stand before it on the line; `RuntimeError: ` is no message of ours.
    messages = re.split(r"(?<![A-Za-z])error: ", output)
    return messages[-1].strip() if len(messages) > 1 else ""


def _last_line(output: str) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]", output) if line.strip() and not _PROGRESS_BAR.search(line)]
    return lines[-1] if lines else ""
