"""The one seam to Ray: jobs become actors. By default a Ray of its own on this machine; or a cluster's address.

Ray places and watches; it keeps nothing. A trial is an actor that starts its processes itself (a Ray Train run of the
same takes six times as long to begin). An evaluation runs in an actor that stays for the next one, until its devices
are wanted for a trial.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.jobs import EvalJob, Job, Outcome, Resources, TrialJob
from cluster.ranks import GRACE_SECONDS, RanksSpec
from cluster.workers import EvalWorker, TrialWorker
from data_pipeline.errors import UserError

_ANSWER_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100_000_000  # nothing but paths and numbers goes through it


@dataclass
class _Running:
    job: Job
    actor: Any


class RayBackend:
    """Runs jobs on Ray."""

    def __init__(self, address: str | None = None) -> None:
        """Start Ray here (address None) or connect. Raises UserError when no cluster answers there."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _check_answers(address)
        import ray

        self._ray = ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address is None:
                ray.init(
                    address="local", num_cpus=_cores(), object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False, _node_ip_address="127.0.0.1",
                    **quiet,
                )  # fmt: skip
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            where = address or "this machine"
            raise UserError(
                f"Ray could not be started or reached at {where}: {error}. Check the address (`ray status`), "
                "or leave out --address to use this machine."
            ) from None
        self._running: dict[Any, _Running] = {}  # by the reference of its result
        self._idle: list[tuple[Resources, Any]] = []  # evaluators that wait for the next export
        self._cwd = Path.cwd()

    def total(self) -> Resources:
        found = self._ray.cluster_resources()
        return Resources(found.get("CPU", 0.0), found.get("GPU", 0.0))

    def largest(self) -> Resources:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        found = max(nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        return Resources(found.get("CPU", 0.0), found.get("GPU", 0.0))

    def now(self) -> float:
        return time.monotonic()

    def start(self, job: Job) -> None:
        if isinstance(job, TrialJob):
            self._make_room(job.resources)
            actor = self._actor(TrialWorker, job.resources, max_concurrency=2)  # `stop` must come through during `run`
            spec = RanksSpec(job.folder, job.num_processes, job.resources.cpus, job.resources.gpus)
            reference = actor.run.remote(spec, self._cwd)
        else:
            actor = self._evaluator(job.resources)
            reference = actor.run.remote(job.export, job.request, job.out, job.shard, self._cwd)
        self._running[reference] = _Running(job, actor)

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._running:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._ended(reference) for reference in ready]

    def stop(self) -> None:
        """Trials save and end; evaluations are short and are dropped."""
        trials = {ref: entry for ref, entry in self._running.items() if isinstance(entry.job, TrialJob)}
        for entry in trials.values():
            entry.actor.stop.remote()
        if trials:
            self._ray.wait(list(trials), num_returns=len(trials), timeout=GRACE_SECONDS + 5)
        self._running.clear()

    def close(self) -> None:
        self._ray.shutdown()

    def _actor(self, kind: type, resources: Resources, *arguments: Any, max_concurrency: int = 1) -> Any:
        options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": max_concurrency}
        return self._ray.remote(kind).options(**options).remote(*arguments)

    def _evaluator(self, resources: Resources) -> Any:
        for i, (held, actor) in enumerate(self._idle):
            if held == resources:
                del self._idle[i]
                return actor
        self._make_room(resources)
        return self._actor(EvalWorker, resources, bool(resources.gpus))

    def _make_room(self, wanted: Resources) -> None:
        """End idle evaluators until `wanted` is free."""
        free = self.total()
        for entry in self._running.values():
            free = free - entry.job.resources
        for held, _ in self._idle:
            free = free - held
        while self._idle and not wanted.fits_in(free):
            held, actor = self._idle.pop()
            self._ray.kill(actor)
            free = free + held

    def _ended(self, reference: Any) -> Outcome:
        entry = self._running.pop(reference)
        try:
            status, message = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # its worker or node died, or it raised what it should not
            self._forget(entry)
            return Outcome(entry.job, "failed", _short(error))
        if isinstance(entry.job, EvalJob):
            self._idle.append((entry.job.resources, entry.actor))
        else:
            self._forget(entry)
        return Outcome(entry.job, status, message)

    def _forget(self, entry: _Running) -> None:
        with contextlib.suppress(Exception):  # it may be dead already
            self._ray.kill(entry.actor)


def _check_answers(address: str | None) -> None:
    """A wrong host or port is said in seconds; Ray would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at --address {address} ({error}). Check host and port (`ray status` on the cluster "
            "names them), or leave out --address to use this machine."
        ) from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _short(error: Exception) -> str:
    """A Ray error's essence: its first line, or the last of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if "Traceback" in str(error) else lines[0]) if lines else type(error).__name__
