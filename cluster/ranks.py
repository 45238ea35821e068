"""The processes of one trial: started on their devices, watched, stopped. Standard library only.

Each gets torch's environment variables, a port of its own on loopback, and its share of the processors. They watch
their parent themselves: whoever kills the process that started them ends them too, after they have saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.jobs import Status
from trainer.ports import free_port
from trainer.watchdog import LOST_EXIT

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL; the trainer ends itself after 25
_LOCK_SECONDS = 60.0
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class RanksSpec:
    """How to start them."""

    folder: Path  # the run folder, with trial.yaml in it
    num_processes: int
    cpus: float  # of all of them
    gpus: float


class Ranks:
    """The running processes of one trial."""

    def __init__(self, spec: RanksSpec) -> None:
        self._spec = spec
        wait_for_lock(spec.folder / "run.lock", _LOCK_SECONDS)
        self._log = spec.folder / "log.txt"
        port = free_port()
        with open(self._log, "ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {spec.num_processes} process(es)\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._processes = [self._start(rank, port, log.fileno()) for rank in range(spec.num_processes)]

    def _start(self, rank: int, port: int, log: int) -> subprocess.Popen[bytes]:
        count = str(self._spec.num_processes)
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(max(1, int(self._spec.cpus // self._spec.num_processes))),
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
            failed = [code for code in codes if code not in (None, 0)]
            self.stop()
            return _one_code([code for code in failed if code is not None])
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
        with open(self._log, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _TAIL_BYTES))
            return log.read().decode(errors="replace")


def classify(code: int, output: str) -> tuple[Status, str]:
    """What an exit code means, and the message that goes with it.

    Exit code 2 is a mistake of the user's, which trying again would not mend, except a port that was taken between its
    choice and its use.
    """
    if code == 0:
        return "done", ""
    if code == 3:
        return "stopped", "stopped before its end"
    message = _error_line(output)
    if code == 2 and not ("port" in message and "in use" in message):
        return "user_error", message
    if code == LOST_EXIT:  # in each other's reach, so one of them said why
        return "failed", f"lost a process: {message or 'the log does not say why'}"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "failed", f"{how}: {message}" if message else how


def wait_for_lock(path: Path, seconds: float) -> None:
    """Wait until nobody holds a run folder: processes of an earlier life may still be saving."""
    deadline = time.monotonic() + seconds
    while path.exists() and time.monotonic() < deadline:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return  # closing the file gives it back
            except BlockingIOError:
                pass
        time.sleep(0.5)


def _one_code(codes: list[int]) -> int:
    """A user error explains the others' failures; a signal comes before what it caused."""
    for wanted in (2, *sorted(code for code in codes if code < 0), *(code for code in codes if code not in (0, 3)), 3):
        if wanted in codes:
            return wanted
    return 0


def _error_line(output: str) -> str:
    """The last `error: ...` message with its following lines, else the last line."""
    # Another process's progress bar may stand before it on the line; `RuntimeError: ` is no message of ours.
    messages = re.split(r"(?<![A-Za-z])error: ", output)
    if len(messages) > 1:
        return messages[-1].strip()
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
