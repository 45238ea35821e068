"""STUDY/status.json: what the driver of a study knows now, for whoever sees the storage. One object:

    driver    pid, host, address, since, now (when this was written), every (seconds between two writes), ended (time;
              null while it lives)
    nodes     name -> cpus, gpus, used_cpus, used_gpus
    running   key -> kind ("trial", "evaluation"), nodes, processes, cpus and gpus (of each node), attempt, since
    waiting   trials, evaluations: how many
    troubles  key -> retries (over all lives of the driver), status and why of the last trouble, time, until (when it is
              tried again; null: it is not paused), end ("failed", "diverged", "cancelled"; null: not given up)
    homeless  [{key, needs}]: jobs that no set of these nodes can hold
    trials    name -> state, progress, device, retries, last_trouble: texts, which MLflow shows as the run's tags

Times are seconds since 1970.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.files.folder import StudyFolder
from cluster.files.verdicts import read_verdict
from cluster.launch.ranks import started_at
from cluster.scheduling.driver import Watcher
from cluster.scheduling.jobs import Outcome, Placement, Resources, TrialJob
from cluster.scheduling.pool import NOTHING
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.troubles import Failure, Retry
from cluster.watching.journal import EVENTS, Event, read_events
from cluster.watching.names import NodeNames
from data_pipeline.files import write_json

STATUS = "status.json"
_EVERY_SECONDS = 2.0
_COST_FACTOR = 20.0  # at most a twentieth of the driver's time goes into this file
_WHY_LENGTH = 500

Trouble = dict[str, Any]


class StatusFile(Watcher):
    """Keeps the file. Nothing that happens to it stops the study."""

    def __init__(
        self, folder: StudyFolder, names: NodeNames, address: str | None, *, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._folder, self._names, self._clock = folder, names, clock
        self._driver = {"pid": os.getpid(), "host": socket.gethostname(), "address": address, "since": clock()}
        self._troubles = troubles(read_events(folder.path / EVENTS))
        self._since: dict[str, float] = {}  # of what runs
        self._settled: dict[str, str] = {}  # the state of trials that neither run nor wait
        self._last: dict[str, Any] = {}
        self._next, self._every = 0.0, _EVERY_SECONDS

    def started(self, placement: Placement) -> None:
        key = placement.job.key
        self._since[key] = self._clock()
        self._settled.pop(key, None)
        if key in self._troubles:
            self._troubles[key] |= {"until": None, "end": None}

    def ended(self, outcome: Outcome, verdict: Retry | Failure | None) -> None:
        key, now = outcome.job.key, self._clock()
        self._since.pop(key, None)
        if isinstance(verdict, Retry):
            note_retry(self._troubles, key, verdict.status, verdict.message, now, now + verdict.pause)
        elif isinstance(verdict, Failure):
            note_end(self._troubles, key, verdict.state, verdict.message, now)
        elif not isinstance(outcome.job, TrialJob):
            self._troubles.pop(key, None)  # there may be very many, and it is over

    def tick(self, scheduler: Scheduler, nodes: Mapping[str, Resources]) -> None:
        began = time.monotonic()
        if began < self._next:
            return
        with contextlib.suppress(OSError, ValueError, KeyError):  # of files that cannot be read now
            self._last = self._snapshot(scheduler, nodes)
        self._write()
        cost = time.monotonic() - began
        self._every = max(_EVERY_SECONDS, _COST_FACTOR * cost)
        self._next = began + self._every

    def end(self) -> None:
        """The driver ends: nothing of the study runs any more."""
        trials = self._last.get("trials", {})
        for name in trials.keys() & self._folder.trials.keys():
            trials[name] |= self._texts(name, _at_rest(self._folder, name, self._troubles), None)
        nodes = {
            name: about | {"used_cpus": 0.0, "used_gpus": 0.0} for name, about in self._last.get("nodes", {}).items()
        }
        self._last |= {"nodes": nodes, "running": {}, "troubles": self._troubles}
        self._write(ended=self._clock())

    def _write(self, *, ended: float | None = None) -> None:
        driver = self._driver | {"now": self._clock(), "every": self._every, "ended": ended}
        with contextlib.suppress(OSError):  # a full disk: the next time, perhaps
            write_json(self._folder.path / STATUS, {"driver": driver, **self._last})

    def _snapshot(self, scheduler: Scheduler, nodes: Mapping[str, Resources]) -> dict[str, Any]:
        running, (trials, evaluations) = scheduler.running, scheduler.num_waiting
        used: dict[str, Resources] = {}
        for placement in running.values():
            for node in placement.nodes:
                used[node] = used.get(node, NOTHING) + placement.shape.per_node
        return {
            "nodes": {self._names(node): _node(has, used.get(node, NOTHING)) for node, has in nodes.items()},
            "running": {key: self._running(placement) for key, placement in running.items()},
            "waiting": {"trials": trials, "evaluations": evaluations},
            "troubles": self._troubles,
            "homeless": [{"key": job.key, "needs": str(job.shapes[0])} for job in scheduler.homeless(nodes)],
            "trials": {name: self._trial(name, scheduler, running.get(name)) for name in self._folder.trials},
        }

    def _running(self, placement: Placement) -> dict[str, Any]:
        shape = placement.shape
        return {
            "kind": "trial" if isinstance(placement.job, TrialJob) else "evaluation",
            "nodes": [self._names(node) for node in placement.nodes], "processes": shape.num_processes,
            "cpus": shape.per_node.cpus, "gpus": shape.per_node.gpus, "attempt": placement.attempt,
            "since": self._since.get(placement.job.key),
        }  # fmt: skip

    def _trial(self, name: str, scheduler: Scheduler, placement: Placement | None) -> dict[str, str]:
        """Files are looked at only of what runs, and once of what has come to its end."""
        if placement is not None:
            began = started_at(self._folder.run_folder(name)) or 0.0
            state = "running" if began >= self._since.get(name, 0.0) else "starting"
        elif name in scheduler.waiting:
            state = _waiting(self._troubles.get(name), self._clock())
        elif name in self._settled:
            return dict(self._last["trials"][name])
        else:
            state = self._settled[name] = _at_rest(self._folder, name, self._troubles)
        return self._texts(name, state, placement)

    def _texts(self, name: str, state: str, placement: Placement | None) -> dict[str, str]:
        trouble = self._troubles.get(name, {})
        device = "" if placement is None else f"{', '.join(map(self._names, placement.nodes))}: {placement.shape}"
        before = self._last.get("trials", {}).get(name, {})
        last = f"{trouble['status']}: {trouble['why']}" if trouble else ""
        return {
            "state": state, "device": device or before.get("device", ""), "retries": str(trouble.get("retries", 0)),
            "progress": self._progress(name, state, before.get("progress")), "last_trouble": last,
        }  # fmt: skip

    def _progress(self, name: str, state: str, before: str | None) -> str:
        if before is not None and state not in ("running", "complete"):
            return before
        nimg = images(self._folder, name, done=state == "complete")
        return f"{nimg / self._folder.trials[name].total_images:.0%}"


def read_status(study: Path) -> dict[str, Any]:
    """What the study's driver last wrote; empty where there is nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((study / STATUS).read_text())
        if isinstance(found, dict) and isinstance(found.get("driver"), dict):
            return found
    return {}


def trial_state(folder: StudyFolder, name: str, status: Mapping[str, Any], *, alive: bool, now: float) -> str:
    """A trial's state in words; `alive`: somebody drives the study, and `status` is what that one says."""
    said = status.get("trials", {}).get(name, {}).get("state") if alive else None
    if said is None:
        return "running" if folder.is_training(name) else _at_rest(folder, name, status.get("troubles", {}))
    if said not in ("waiting", "retrying", "no space"):
        return str(said)
    trouble = status["troubles"].get(name)
    state = _waiting(trouble, now)
    return f"retrying in {trouble['until'] - now:.0f} s" if trouble and state == "retrying" else state


def images(folder: StudyFolder, name: str, *, done: bool) -> int:
    """Images that a trial has seen."""
    if done:
        return folder.trials[name].total_images
    record = folder.last_record(name)
    return record.nimg if record else folder.progress(name)  # a life that has just begun has no record yet


def troubles(events: Iterable[Event]) -> dict[str, Trouble]:
    """What each job went through in earlier lives of the driver; of evaluations, those that are not done."""
    found: dict[str, Trouble] = {}
    for event in events:
        if event["event"] == "retry":
            note_retry(found, event["key"], event["status"], event["message"], event["time"], None)
        elif event["event"] == "failure":
            note_end(found, event["key"], event["state"], event["message"], event["time"])
        elif event["event"] == "ended" and (event["kind"], event["status"]) == ("evaluation", "done"):
            found.pop(event["key"], None)
    return found


def note_retry(
    found: dict[str, Trouble], key: str, status: str, why: str, now: float, until: float | None
) -> None:  # fmt: skip
    retries = found.get(key, {}).get("retries", 0) + 1
    found[key] = _trouble(retries, status, why, now, until=until)


def note_end(found: dict[str, Trouble], key: str, state: str, why: str, now: float) -> None:
    retries = found.get(key, {}).get("retries", 0)
    found[key] = _trouble(retries, state, why, now, end=state)


def _trouble(
    retries: int, status: str, why: str, now: float, *, until: float | None = None, end: str | None = None
) -> Trouble:  # fmt: skip
    why = why[:_WHY_LENGTH]
    return {"retries": retries, "status": status, "why": why, "time": now, "until": until, "end": end}


def _waiting(trouble: Trouble | None, now: float) -> str:
    """The state of a trial that will be started: what it waits for."""
    if trouble is None or (trouble["until"] or 0.0) <= now:
        return "waiting"
    return "no space" if trouble["status"] == "no_space" else "retrying"


def _at_rest(folder: StudyFolder, name: str, troubled: Mapping[str, Trouble]) -> str:
    """The state of a trial that neither runs nor waits for somebody who drives the study."""
    if folder.trial_done(name):
        return "complete"
    verdict = read_verdict(folder.run_folder(name))
    if verdict is not None:
        return verdict.state
    if troubled.get(name, {}).get("end") == "failed":
        return "failed"
    return "stopped" if images(folder, name, done=False) else "waiting"


def _node(has: Resources, used: Resources) -> dict[str, float]:
    return {"cpus": has.cpus, "gpus": has.gpus, "used_cpus": used.cpus, "used_gpus": used.gpus}
