"""STUDY/events.jsonl: what happened to a study, over all lives of its driver; one JSON object a line.

Every line has `time` (seconds since 1970) and `event`, and beside them

    driver_started  pid, host, address (of Ray's cluster; null: its own), study, versions, last_seen (time at which the
                    driver before was alive, where that one wrote no end)
    driver_ended    how ("complete", "failed": some jobs were given up, "stopped": by request, "error"), message
    nodes           joined: {name: {"cpus", "gpus"}}, lost: [name, ...]
    started         key, kind ("trial", "evaluation"), attempt, nodes (names), processes, cpus and gpus (of each node),
                    expected (seconds)
    ended           key, kind, attempt, status, seconds (since it started), startup (of a trial: seconds), message
    retry           key, attempt (that ended), pause (seconds), status, message
    failure         key, attempts, state ("failed", "diverged", "cancelled"), message
    told            text: an edit of the study file, a trial that was cancelled, ...

Jobs that were running when a driver ended have no end of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.launch.parity import environment
from cluster.scheduling.driver import Summary, Watcher
from cluster.scheduling.jobs import Outcome, Placement, Resources, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.troubles import Failure, Retry
from cluster.watching.names import NodeNames

EVENTS = "events.jsonl"
_LONGEST_MESSAGE = 2000
_LAST_BYTES = 65536

Event = dict[str, Any]


class Lines:
    """A file that lines are appended to. What finds no room on a full disk is kept, and written when there is some."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = bytearray()
        self._is_whole = False  # does the file end with a whole line?

    def append(self, line: str) -> None:
        """Never raises OSError."""
        self._kept += line.encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Try to write what is kept. Returns whether nothing is left."""
        if not self._kept:
            return True
        with contextlib.suppress(OSError):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if not self._is_whole and _is_torn(file):
                    self._kept[:0] = b"\n"  # whoever wrote it was killed
                self._is_whole = True
                while self._kept:  # a disk that fills up takes a part
                    del self._kept[: os.write(file, self._kept)]
            finally:
                os.close(file)
        return not self._kept


class Journal(Watcher):
    """Writes the journal of one life of a driver. Nothing that happens to it stops the study."""

    def __init__(self, study: Path, names: NodeNames, *, clock: Callable[[], float] = time.time) -> None:
        self._lines, self._names, self._clock = Lines(study / EVENTS), names, clock
        self._study = study
        self._running: dict[str, tuple[float, Placement]] = {}
        self._nodes: dict[str, Resources] = {}

    @contextlib.contextmanager
    def life(self, study: str, address: str | None) -> Iterator[Callable[[Summary], None]]:
        """A driver's life in a block, which hands over its summary."""
        found: list[Summary] = []
        self._write(
            "driver_started", pid=os.getpid(), host=socket.gethostname(), address=address, study=study,
            versions=environment(), last_seen=_last_seen(self._study),
        )  # fmt: skip
        try:
            yield found.append
        except BaseException as error:
            self._write("driver_ended", how="error", message=_short(str(error) or type(error).__name__))
            raise
        self._write("driver_ended", how=_how(found[-1]) if found else "complete", message="")

    def started(self, placement: Placement) -> None:
        shape, job = placement.shape, placement.job
        self._running[job.key] = self._clock(), placement
        self._write(
            "started", **_about(placement), nodes=[self._names(node) for node in placement.nodes],
            processes=shape.num_processes, cpus=shape.per_node.cpus, gpus=shape.per_node.gpus,
            expected=placement.seconds,
        )  # fmt: skip

    def ended(self, outcome: Outcome, verdict: Retry | Failure | None) -> None:
        key = outcome.job.key
        since, placement = self._running.pop(key, (self._clock(), Placement(outcome.job, outcome.job.shapes[0], ())))
        self._write(
            "ended", **_about(placement), status=outcome.status, seconds=self._clock() - since,
            startup=outcome.startup, message=_short(outcome.message),
        )  # fmt: skip
        if isinstance(verdict, Retry):
            self._write(
                "retry", key=key, attempt=verdict.attempt, pause=verdict.pause, status=verdict.status,
                message=_short(verdict.message),
            )  # fmt: skip
        elif isinstance(verdict, Failure):
            message = _short(verdict.message)
            self._write("failure", key=key, attempts=verdict.attempts, state=verdict.state, message=message)

    def told(self, text: str) -> None:
        self._write("told", text=text)

    def nodes(self, joined: Sequence[str], lost: Sequence[str]) -> None:
        there = self._names.there()
        devices = {name: _devices(there.get(name, Resources())) for name in joined}
        self._write("nodes", joined=devices, lost=list(lost))

    def tick(self, scheduler: Scheduler, nodes: Mapping[str, Resources]) -> None:
        self._lines.flush()

    def _write(self, event: str, **about: Any) -> None:
        self._lines.append(json.dumps({"time": self._clock(), "event": event, **about}))


def read_events(path: Path) -> list[Event]:
    """All events of a journal, oldest first; none where there is no journal. Lines that were torn are left out."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return []


def last_events(path: Path, num: int) -> list[Event]:
    """The newest `num` events, or somewhat fewer, without reading a long journal."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _LAST_BYTES))
            return _parsed(file.read())[-num:]
    except OSError:
        return []


def _parsed(content: bytes) -> list[Event]:
    found = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "time" in event and "event" in event:
                found.append(event)
    return found


def _about(placement: Placement) -> dict[str, Any]:
    kind = "trial" if isinstance(placement.job, TrialJob) else "evaluation"
    return {"key": placement.job.key, "kind": kind, "attempt": placement.attempt}


def _devices(resources: Resources) -> dict[str, float]:
    return {"cpus": resources.cpus, "gpus": resources.gpus}


def _how(summary: Summary) -> str:
    if summary.stopped:
        return "stopped"
    return "failed" if any(failure.state == "failed" for failure in summary.failures) else "complete"


def _last_seen(study: Path) -> float | None:
    """When a driver that was killed last wrote STUDY/status.json."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        driver = json.loads((study / "status.json").read_text())["driver"]
        return float(driver["now"]) if driver["ended"] is None else None
    return None


def _short(message: str) -> str:
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."


def _is_torn(file: int) -> bool:
    """Does a file end within a line?"""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"
