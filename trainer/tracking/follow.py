"""The life of a child process that mirrors records: started beside a run, never in its way.

The child polls until the work is complete, its parent is gone or it is asked to stop (SIGTERM), and then makes a last
pass. Failures are retried with growing pauses and reported once, not at every try. No mlflow import here: the training
process starts and ends its child with this module, and where mlflow is not installed the child only says so.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import run_cli

_POLL_SECONDS = 3.0
_LAST_PASS_SECONDS = 20.0


class Backoff:
    """Pauses of 1, 2, 4, ... seconds up to a minute."""

    def __init__(self, first: float = 1.0, longest: float = 60.0) -> None:
        self._first, self._longest, self._next = first, longest, first

    def next(self) -> float:
        pause, self._next = self._next, min(2 * self._next, self._longest)
        return pause

    def reset(self) -> None:
        self._next = self._first


class StopRequest:
    """True once the parent process is gone or SIGTERM came."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides, not we

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked or os.getppid() != self._parent


def follow(
    one_pass: Callable[[], bool],
    *,
    report: Callable[[Exception | None], None],
    stop: StopRequest | Callable[[], bool],
    poll_seconds: float = _POLL_SECONDS,
) -> None:
    """Call `one_pass` until it returns True (all complete) or `stop` says so; then one more time.

    `report` is called with the first error of a series, and with None when a series of errors is over.
    """
    stopping = stop if callable(stop) else lambda: bool(stop)
    backoff, failing = Backoff(), False
    while True:
        last = stopping()
        try:
            complete = one_pass()
        except Exception as error:  # a tracker may fail in any way and must stop nothing
            complete, pause = False, backoff.next()
            if not failing:
                report(error)
            failing = True
        else:
            if failing:
                report(None)
            failing, pause = False, poll_seconds
            backoff.reset()
        if complete or last:
            return
        _sleep(pause, stopping)


def _sleep(seconds: float, stopping: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopping():
        time.sleep(min(0.2, seconds))


class SyncProcess:
    """The child that mirrors `folder` to a tracker while the owner lives."""

    def __init__(self, folder: Path, *, uri: str | None = None, experiment: str | None = None) -> None:
        command = [sys.executable, "-m", "trainer.tracking.follow", str(folder), "--follow"]
        command += ["--experiment", experiment] if experiment else []
        environment = dict(os.environ)
        if uri:  # by environment: a command line can be read by everybody on the machine, credentials and all
            environment["MLFLOW_TRACKING_URI"] = uri
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)

    def stop(self, timeout: float = _LAST_PASS_SECONDS) -> None:
        """Ask for the last pass and wait for it; a tracker that is too slow is left behind."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def main(arguments: list[str]) -> int:
    """The child: `trainer.tracking.mlflow_sync` with these arguments, or a warning where it cannot be imported."""
    try:
        from trainer.tracking.mlflow_sync import main as mirror
    except ImportError as error:
        later = shlex.join(word for word in arguments if word != "--follow")
        print(
            f"warning: nothing is sent to MLflow ({error}); training goes on, the records are kept. Send them later, "
            f"where it is installed: python -m trainer.tracking.mlflow_sync {later}",
            file=sys.stderr,
            flush=True,
        )
        return 0
    return mirror()


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
