"""What runs in a cluster's worker processes: a trial's keeper and an evaluator. Plain classes, without Ray."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.launch.parity import environment, skew
from cluster.launch.ranks import Ranks, RanksSpec, classify, first_sentence, oom_kills, started_at
from cluster.scheduling.jobs import Status
from data_pipeline.errors import USER_ERROR_EXIT, UserError, disk_error
from trainer.exits import Exit

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ended:
    """How the work of one worker process ended."""

    status: Status
    message: str = ""
    startup: float | None = None  # seconds from when it was sent to its first step, where that is known here


@dataclass(frozen=True)
class Sent:
    """What the driver sends along with every job."""

    time: float  # seconds since 1970
    cwd: Path  # relative paths are relative to it
    environment: Mapping[str, str] | None  # the driver's; None: any will do

    def enter(self) -> str | None:
        """Go where the driver is. Returns why nothing should be run here, if so."""
        try:
            os.chdir(self.cwd)
        except OSError as error:
            return f"{_here()} does not see {self.cwd} ({error.strerror}): mount the same storage on all nodes."
        return None if self.environment is None else skew(self.environment, environment(), _here())


class TrialWorker:
    """Starts a trial's processes where it runs itself, on the devices it was given, and watches them."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def free_port(self, address: str) -> int:
        """A TCP port for the trial's processes on all nodes to meet at, on this one."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            port: int = probe.getsockname()[1]
            return port

    def run(self, spec: RanksSpec, port: int | None, sent: Sent) -> Ended:
        """Returns when they have ended: how, and why. `port`: where processes of several nodes meet."""
        problem = sent.enter()
        if problem is not None:
            return Ended("user_error", problem)
        kills = oom_kills()
        try:
            ranks = Ranks(spec, port)
        except OSError as error:
            known = disk_error(error)
            return Ended("failed", str(error)) if known is None else _ended(known)
        try:
            while (code := ranks.poll()) is None:
                if self._stop.is_set():
                    ranks.stop()
                time.sleep(_POLL_SECONDS)
        finally:
            ranks.stop()
        status, message = classify(code, ranks.output(), ran_out_of_memory=oom_kills() > kills)
        if status == "done" and not (spec.folder / "result.json").exists():
            status, message = "failed", "ended without a result file"  # that is the proof, not an exit code
        first_step = started_at(spec.folder)
        startup = first_step - sent.time if first_step is not None and first_step > sent.time else None
        return Ended(status, message, startup)

    def stop(self) -> None:
        """Called from another thread while `run` waits."""
        self._stop.set()


class EvalWorker:
    """Evaluates one export after the other; what is slow to load is loaded once."""

    def __init__(self, has_gpu: bool) -> None:
        if not has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported

    def run(self, export: Path, request: Any, out: Path, shard: tuple[int, int], sent: Sent) -> Ended:
        problem = sent.enter()
        if problem is not None:
            return Ended("user_error", problem)
        from evaluation.chunks import Shard
        from evaluation.evaluate import evaluate_to

        startup = time.time() - sent.time
        try:
            evaluate_to(out, export, request, shard=Shard(*shard), progress=False)
        except Exception as error:  # whatever it is, the trial's folder should say where it came from
            known = error if isinstance(error, UserError) else disk_error(error)
            if known is None:
                return Ended("failed", _write_down(export.parent.parent, error))
            return _ended(known)
        return Ended("done", startup=startup)


_STATUS: dict[int, Status] = {
    USER_ERROR_EXIT: "user_error", Exit.DIVERGED: "diverged", Exit.NO_SPACE: "no_space",
}  # fmt: skip


def _ended(error: UserError) -> Ended:
    status, message = _STATUS.get(error.exit_code, "failed"), str(error)
    return Ended(status, first_sentence(message) if status == "no_space" else message)


def _write_down(run: Path, error: Exception) -> str:
    """Add a traceback to the run's log. Returns the error in a line."""
    text = "".join(traceback.format_exception(error))
    try:
        with open(run / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} evaluation on {_here()}\n{text}")
    except OSError:  # a full disk must not hide what went wrong
        pass
    return f"{type(error).__name__}: {error}"


def _here() -> str:
    return f"host {socket.gethostname()}"
