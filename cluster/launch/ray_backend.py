"""The one seam to Ray: jobs become actors. By default a Ray of its own on this machine; or a cluster's address.

Ray places and watches; it keeps nothing. A trial is an actor on each of its nodes that starts its processes itself (a
Ray Train run of the same takes six times as long to begin); those of several nodes share a placement group, which Ray
gives as a whole or not at all. An evaluation runs in an actor that stays for the next one on its node, until the
devices are wanted for something else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.launch.parity import environment
from cluster.launch.ranks import GRACE_SECONDS, RanksSpec
from cluster.launch.workers import Ended, EvalWorker, Sent, TrialWorker
from cluster.scheduling.jobs import EvalJob, Outcome, Placement, Resources, Shape, Status, TrialJob
from data_pipeline.errors import UserError

_ANSWER_SECONDS = 10.0
_PROBE_SECONDS = 1.0  # for a node of the cluster to answer
_GONE_SECONDS = 30.0  # what a job gets to end after its node has died
_NUM_PROBES = 3  # at a look at the nodes
# Ray of one machine (its default on systems other than Linux): it listens on loopback, not on all interfaces.
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_OBJECT_STORE_BYTES = 100_000_000  # nothing but paths and numbers goes through it
_NODES_SECONDS = 1.0  # between two looks at which nodes there are
_WANT_SECONDS = 5.0  # between two requests for nodes
_IDLE_SECONDS = 60.0  # how long an evaluator waits for work; on a node that is in use a cluster cannot take it away


@dataclass
class _Running:
    placement: Placement
    actors: list[Any]  # one a node
    group: Any = None  # the placement group of several nodes
    waited_for: int = 0  # actors that have not ended
    ended: list[Ended] = field(default_factory=list)
    give_up_at: float | None = None  # when the others have had time enough to end
    gone_since: float | None = None  # one of its nodes


@dataclass
class _Idle:
    """An evaluator that waits for the next export."""

    node: str
    resources: Resources
    actor: Any
    since: float


class RayBackend:
    """Runs jobs on Ray."""

    def __init__(self, address: str | None = None, *, grows: bool = False, allow_skew: bool = False) -> None:
        """Start Ray here (address None) or connect. Raises UserError when no cluster answers there.

        Args:
            grows: ask the cluster's autoscaler for the nodes that are wanted.
            allow_skew: let workers have other versions than this process.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            os.environ.setdefault(_ONE_MACHINE, "0")
        _check_answers(address)
        import ray

        self._ray, self.grows = ray, grows
        _connect(ray, address)
        # On this machine there is one installation.
        self._compares = not allow_skew and address is not None
        self._running: dict[str, _Running] = {}
        self._references: dict[Any, str] = {}  # of results to come -> the job's key
        self._idle: list[_Idle] = []
        self._nodes: dict[str, Resources] = {}
        self._addresses: dict[str, str] = {}
        self._ports: dict[str, tuple[str, int]] = {}  # where each node's own process listens
        self._silent: list[str] = []  # nodes that Ray, which takes its time, believes alive and that do not answer
        self._versions: dict[str, str] = {}
        self._looked_at = self._wanted_at = self._read_at = float("-inf")
        self._wanted: list[dict[str, float]] = []
        self._cwd = Path.cwd()

    # ---- nodes --------------------------------------------------------------------------------------------------

    def nodes(self) -> Mapping[str, Resources]:
        if self.now() - self._looked_at > _NODES_SECONDS:
            self._looked_at = self.now()
            alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
            self._ports = {
                node: (about["NodeManagerAddress"], about["NodeManagerPort"]) for node, about in alive.items()
            }
            self._ask_the_silent(alive)
            alive = {node: about for node, about in alive.items() if node not in self._silent}
            devices = {node: _resources(about["Resources"]) for node, about in alive.items()}
            self._nodes = {node: has for node, has in devices.items() if has.cpus or has.gpus}
            self._addresses |= {node: about["NodeManagerAddress"] for node, about in alive.items()}
            self._idle = [idle for idle in self._idle if idle.node in alive]
        return self._nodes

    def _ask_the_silent(self, alive: Mapping[str, Any]) -> None:
        """A few at a time: each may take its second not to answer."""
        self._silent = [node for node in self._silent if node in alive]
        asked, later = self._silent[:_NUM_PROBES], self._silent[_NUM_PROBES:]
        self._silent = later + [node for node in asked if not _answers(*self._ports[node])]

    def name(self, node: str) -> str:
        address = self._addresses[node]
        alike = sum(self._addresses[other] == address for other in self._nodes)
        return address if alike <= 1 else f"{address}/{node[:4]}"  # several nodes on one host: tests have them

    def now(self) -> float:
        return time.monotonic()

    def want(self, shapes: list[Shape]) -> None:
        bundles = [_bundle(shape.per_node) for shape in shapes for _ in range(shape.num_nodes)]
        if bundles != self._wanted and self.now() - self._wanted_at > _WANT_SECONDS:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=bundles)
            self._wanted, self._wanted_at = bundles, self.now()

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def start(self, placement: Placement) -> None:
        sent = Sent(time.time(), self._cwd, self._environment() if self._compares else None)
        if isinstance(placement.job, TrialJob):
            running, references = self._start_trial(placement, placement.job, sent)
        else:
            running, references = self._start_evaluation(placement, placement.job, sent)
        running.waited_for = len(references)
        self._running[placement.job.key] = running
        self._references |= dict.fromkeys(references, placement.job.key)

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._references:
            time.sleep(seconds)
        else:
            ready, _ = self._ray.wait(list(self._references), num_returns=1, timeout=seconds)
            if ready:
                ready, _ = self._ray.wait(list(self._references), num_returns=len(self._references), timeout=0)
            for reference in ready:
                self._note(reference)
        self._end_idle(older_than=_IDLE_SECONDS)
        over = [key for key, running in self._running.items() if self._is_over(running)]
        return [self._outcome(self._running.pop(key)) for key in over]

    def stop_job(self, key: str) -> None:
        running = self._running.get(key)
        if running is not None and isinstance(running.placement.job, TrialJob):  # evaluations are short
            for actor in running.actors:
                actor.stop.remote()

    def stop(self) -> None:
        """Trials save and end; evaluations are short and are dropped."""
        trials = [key for key, running in self._running.items() if isinstance(running.placement.job, TrialJob)]
        for key in trials:
            self.stop_job(key)
        references = [reference for reference, key in self._references.items() if key in trials]
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=GRACE_SECONDS + 5)
        self._running.clear()
        self._references.clear()

    def close(self) -> None:
        if self.grows and self._wanted:
            self._wanted_at = float("-inf")
            self.want([])  # the cluster may shrink again
        self._ray.shutdown()

    def _environment(self) -> dict[str, str]:
        if self.now() - self._read_at > _NODES_SECONDS:
            self._versions, self._read_at = environment(), self.now()
        return self._versions

    # ---- starting -----------------------------------------------------------------------------------------------

    def _start_trial(self, placement: Placement, job: TrialJob, sent: Sent) -> tuple[_Running, list[Any]]:
        shape, strategies, group = placement.shape, [self._on_node(node) for node in placement.nodes], None
        for node in placement.nodes:
            self._make_room(node, shape.per_node)
        if shape.num_nodes > 1:
            group, strategies = self._group(placement)
        # `stop` must come through during `run`.
        actors = [self._actor(TrialWorker, shape.per_node, strategy, max_concurrency=2) for strategy in strategies]
        master = self._addresses[placement.nodes[0]] if group is not None else "127.0.0.1"
        port = actors[0].free_port.remote(master) if group is not None else None
        specs = [
            RanksSpec(
                job.folder, shape.num_processes, shape.per_node.cpus, shape.per_node.gpus, i, shape.num_nodes, master
            )
            for i in range(shape.num_nodes)
        ]
        references = [actor.run.remote(spec, port, sent) for actor, spec in zip(actors, specs, strict=True)]
        return _Running(placement, actors, group), references

    def _start_evaluation(self, placement: Placement, job: EvalJob, sent: Sent) -> tuple[_Running, list[Any]]:
        (node,), resources = placement.nodes, placement.shape.per_node
        found = next((idle for idle in self._idle if (idle.node, idle.resources) == (node, resources)), None)
        if found is not None:
            self._idle.remove(found)
            actor = found.actor
        else:
            self._make_room(node, resources)
            actor = self._actor(EvalWorker, resources, self._on_node(node), bool(resources.gpus))
        return _Running(placement, [actor]), [actor.run.remote(job.export, job.request, job.out, job.shard, sent)]

    def _actor(
        self, kind: type, resources: Resources, strategy: Any, *arguments: Any, max_concurrency: int = 1
    ) -> Any:  # fmt: skip
        options = {
            "num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": max_concurrency,
            "scheduling_strategy": strategy,
        }  # fmt: skip
        return self._ray.remote(kind).options(**options).remote(*arguments)

    def _on_node(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=False)

    def _group(self, placement: Placement) -> tuple[Any, list[Any]]:
        """A placement group on the placement's nodes, and the strategy of each of its bundles."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [_bundle(placement.shape.per_node) for _ in placement.nodes]
        labels = [{"ray.io/node-id": node} for node in placement.nodes]
        group = placement_group(bundles, strategy="STRICT_SPREAD", bundle_label_selector=labels)
        return group, [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(len(bundles))
        ]

    def _make_room(self, node: str, wanted: Resources) -> None:
        """End idle evaluators of a node, the longest idle first, until `wanted` is free."""
        held = [idle.resources for idle in self._idle if idle.node == node]
        held += [r.placement.shape.per_node for r in self._running.values() if node in r.placement.nodes]
        free = self._nodes.get(node, Resources()) - sum(held, Resources())
        for idle in [idle for idle in self._idle if idle.node == node]:
            if wanted.fits_in(free):
                return
            self._end_evaluator(idle)
            free = free + idle.resources

    def _end_idle(self, *, older_than: float) -> None:
        for idle in [idle for idle in self._idle if self.now() - idle.since > older_than]:
            self._end_evaluator(idle)

    def _end_evaluator(self, idle: _Idle) -> None:
        self._idle.remove(idle)
        self._ray.kill(idle.actor)

    # ---- ending -------------------------------------------------------------------------------------------------

    def _note(self, reference: Any) -> None:
        """One actor of a job has ended."""
        running = self._running[self._references.pop(reference)]
        running.waited_for -= 1
        try:
            ended = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # it raised what it should not
            ended = Ended("failed", _short(error))
        except self._ray.exceptions.RayError as error:  # its worker or its node died
            ended = Ended("out_of_memory" if _lacked_memory(error) else "lost", _short(error))
            self._look_after(running.placement.nodes)
        running.ended.append(ended)
        if ended.status != "done" and running.waited_for and running.give_up_at is None:
            running.give_up_at = self.now() + GRACE_SECONDS + 5
            self.stop_job(running.placement.job.key)

    def _look_after(self, nodes: Sequence[str]) -> None:
        """Something died there: nothing is to be sent to a node that has died with it."""
        dead = {node for node in nodes if node in self._ports and not _answers(*self._ports[node])}
        if dead:
            self._silent += [node for node in dead if node not in self._silent]
            self._looked_at = float("-inf")

    def _is_over(self, running: _Running) -> bool:
        if running.waited_for == 0:
            return True
        if all(node in self._nodes for node in running.placement.nodes):
            running.gone_since = None
        elif running.gone_since is None:
            running.gone_since = self.now()
        elif self.now() - running.gone_since > _GONE_SECONDS:  # what waits for a dead node would wait for ever
            return True
        return running.give_up_at is not None and self.now() > running.give_up_at

    def _outcome(self, running: _Running) -> Outcome:
        job = running.placement.job
        for reference in [reference for reference, key in self._references.items() if key == job.key]:
            del self._references[reference]
        ended = min(running.ended or [Ended("lost", "its node has died")], key=_explains)
        if isinstance(job, EvalJob) and ended.status == "done":  # one that failed may be broken itself
            (node,) = running.placement.nodes
            self._idle.append(_Idle(node, running.placement.shape.per_node, running.actors[0], self.now()))
        else:
            self._forget(running)
        startup = next((one.startup for one in running.ended if one.startup is not None), None)
        return Outcome(job, ended.status, ended.message, startup)

    def _forget(self, running: _Running) -> None:
        for actor in running.actors:
            with contextlib.suppress(Exception):  # it may be dead already
                self._ray.kill(actor)
        if running.group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(running.group)


# Of the ends of a job's actors, what explains the others comes first.
_ORDER: tuple[Status, ...] = (
    "user_error", "diverged", "out_of_memory", "no_space", "lost", "failed", "stopped", "done",
)  # fmt: skip


def _lacked_memory(error: Exception) -> bool:
    """Did Ray's memory monitor end the worker? It does so before the system would."""
    return type(error).__name__ == "OutOfMemoryError" or "memory monitor" in str(error) or "due to OOM" in str(error)


def _explains(ended: Ended) -> tuple[int, bool]:
    return _ORDER.index(ended.status), ended.message.startswith("lost a process")


def _connect(ray: Any, address: str | None) -> None:
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
            f"Ray could not be started or reached at {where}: {error}. Check the address (`ray status`) and, where the "
            "cluster asks for a token, RAY_AUTH_MODE=token with the token; or leave out --address to use this machine."
        ) from None


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


def _answers(address: str, port: int) -> bool:
    """Does anybody listen there?"""
    try:
        socket.create_connection((address, port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _resources(found: Mapping[str, float]) -> Resources:
    return Resources(found.get("CPU", 0.0), found.get("GPU", 0.0))


def _bundle(resources: Resources) -> dict[str, float]:
    """As Ray writes it."""
    return {name: number for name, number in (("CPU", resources.cpus), ("GPU", resources.gpus)) if number}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _short(error: Exception) -> str:
    """A Ray error's essence: its first line, or the last of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if "Traceback" in str(error) else lines[0]) if lines else type(error).__name__
