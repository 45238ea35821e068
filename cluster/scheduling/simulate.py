"""A backend without machines: jobs take their expected time on a clock that jumps. For plans, and for tests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.scheduling.driver import Watcher, run_jobs, waiting_trials
from cluster.scheduling.jobs import Changes, EvalJob, Job, Outcome, Placement, Resources, Shape, Status, TrialJob
from cluster.scheduling.pool import NOTHING
from cluster.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class SimulatedTrial:
    """A trial and the share of its time after which each export exists."""

    job: TrialJob
    exports: tuple[tuple[float, int], ...]  # (share, nimg)


@dataclass(frozen=True)
class NodeEvent:
    """A node that comes (with its devices) or goes (without)."""

    time: float
    node: str
    resources: Resources | None = None


@dataclass
class _Life:
    """A job that runs: from which share of its work, since when."""

    placement: Placement
    began: float
    first: float


@dataclass(frozen=True)
class _Export:
    """A point of a trial that comes to be, if that life still goes on then."""

    life: _Life
    nimg: int


@dataclass
class SimulatedCluster:
    """Backend and files in one: what a job 'did' is a fact of the simulated world."""

    devices: dict[str, Resources]
    trials: dict[str, SimulatedTrial]
    evaluations: Callable[[str, int], Sequence[EvalJob]] = lambda trial, nimg: ()
    fate: Callable[[Job, int], Status] = lambda job, attempt: "done"  # by job and attempt, from 1
    node_events: Sequence[NodeEvent] = ()
    clock: float = 0.0
    done: set[str] = field(default_factory=set)  # keys of trials and evaluations
    log: list[tuple[float, str, str]] = field(default_factory=list)  # (time, "start" | status, key)
    spans: list[Span] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)
    _events: list[tuple[float, int, NodeEvent | _Life | _Export]] = field(default_factory=list)
    _number: int = 0
    _running: dict[str, _Life] = field(default_factory=dict)
    _exports: dict[str, list[int]] = field(default_factory=dict)
    _new_exports: set[str] = field(default_factory=set)
    _outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        for event in self.node_events:
            self._push(event.time, event)

    # ---- the backend --------------------------------------------------------------------------------------------

    def nodes(self) -> Mapping[str, Resources]:
        return self.devices

    def name(self, node: str) -> str:
        return node

    def now(self) -> float:
        return self.clock

    def start(self, placement: Placement) -> None:
        job = placement.job
        life = _Life(placement, self.clock, self._saved_share(job))
        self._running[job.key] = life
        if isinstance(job, TrialJob):
            for share, nimg in self.trials[job.key].exports:
                if share > life.first:
                    self._push(self.clock + (share - life.first) * placement.seconds, _Export(life, nimg))
        self._push(self.clock + (1 - life.first) * placement.seconds, life)  # after an export at the end
        self.log.append((self.clock, "start", job.key))

    def wait(self, seconds: float) -> list[Outcome]:
        """Jumps to the next moment at which something happens."""
        if not self._outcomes:
            moment = self._events[0][0] if self._events else self.clock + seconds
            self.clock = max(self.clock, moment if self._running else min(moment, self.clock + seconds))
            while self._events and self._events[0][0] <= self.clock:
                self._happen(heapq.heappop(self._events)[2])
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    grows = False

    def want(self, shapes: list[Shape]) -> None:
        """A simulated cluster does not grow."""

    def stop_job(self, key: str) -> None:
        self._end(self._running[key], "stopped")

    def stop(self) -> None:
        for life in list(self._running.values()):
            self._end(life, "stopped")
        self._outcomes.clear()

    def close(self) -> None:
        self.stop()

    # ---- the files ----------------------------------------------------------------------------------------------

    def job(self, trial: str) -> TrialJob | None:
        return self.trials[trial].job if trial in self.trials else None

    def trial_done(self, trial: str) -> bool:
        return trial in self.done

    def proved(self, job: Job) -> bool:
        return job.key in self.done

    def shows_all(self, trial: str) -> bool:
        return True

    def verdict(self, trial: str) -> str | None:
        return self.verdicts.get(trial)

    def missing_evaluations(self, trial: str) -> list[EvalJob]:
        exports = self._exports.get(trial, ())
        return [job for nimg in exports for job in self.evaluations(trial, nimg) if job.key not in self.done]

    def exported(self, trials: Iterable[str]) -> Iterable[str]:
        new, self._new_exports = self._new_exports, set()
        return sorted(new)

    def progress(self, trial: str) -> int:
        return max(self._exports.get(trial, ()), default=0)

    def diverging(self, trials: Iterable[str]) -> Mapping[str, str]:
        return {}

    def end_trial(self, trial: str, state: str, reason: str) -> None:
        self.verdicts[trial] = state

    def shrink_micro_batch(self, trial: str) -> str | None:
        return None

    def changes(self) -> Changes:
        return Changes()

    # ---- what happens -------------------------------------------------------------------------------------------

    def _push(self, time: float, what: NodeEvent | _Life | _Export) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, what))

    def _saved_share(self, job: Job) -> float:
        """An export comes with a checkpoint: a trial goes on from its last one."""
        saved = self._exports.get(job.key, ())
        shares = [share for share, nimg in self.trials[job.key].exports if nimg in saved] if saved else []
        return min(max(shares, default=0.0), 1.0)

    def _happen(self, what: NodeEvent | _Life | _Export) -> None:
        if isinstance(what, NodeEvent):
            self._change_node(what)
            return
        life = what.life if isinstance(what, _Export) else what
        job = life.placement.job
        if self._running.get(job.key) is not life:
            return  # it ended before
        if isinstance(what, _Export):
            self._exports.setdefault(job.key, []).append(what.nimg)
            self._new_exports.add(job.key)
        else:
            self._end(life, self.fate(job, life.placement.attempt))

    def _change_node(self, event: NodeEvent) -> None:
        if event.resources is not None:
            self.devices = self.devices | {event.node: event.resources}
            return
        self.devices = {node: has for node, has in self.devices.items() if node != event.node}
        for life in [life for life in self._running.values() if event.node in life.placement.nodes]:
            self._end(life, "lost")

    def _end(self, life: _Life, status: Status) -> None:
        job = life.placement.job
        del self._running[job.key]
        if status == "done":
            self.done.add(job.key)
        self.log.append((self.clock, status, job.key))
        kind: Literal["trial", "evaluation"] = "trial" if isinstance(job, TrialJob) else "evaluation"
        shape = life.placement.shape
        self.spans += [
            Span(job.key, kind, node, life.began, self.clock, shape.per_node) for node in life.placement.nodes
        ]
        self._outcomes.append(Outcome(job, status, "" if status == "done" else f"simulated {status}"))


@dataclass(frozen=True)
class Span:
    """When a job held devices of a node."""

    key: str
    kind: Literal["trial", "evaluation"]
    node: str
    start: float  # seconds from the study's start
    end: float
    resources: Resources


@dataclass(frozen=True)
class Schedule:
    """A study from its first start to its last end."""

    makespan: float  # seconds
    bound: float  # seconds that no schedule can go below
    spans: tuple[Span, ...]


def simulated_schedule(
    trials: Sequence[SimulatedTrial], nodes: Mapping[str, Resources],
    evaluations: Callable[[str, int], Sequence[EvalJob]], *, eval_share: float = 0.25, watchers: Sequence[Watcher] = (),
) -> Schedule:  # fmt: skip
    """What the real scheduler would do, were every time as expected. Raises UserError for what never fits."""
    jobs = [trial.job for trial in trials]
    world = SimulatedCluster(dict(nodes), {trial.job.key: trial for trial in trials}, evaluations)
    scheduler = Scheduler(waiting_trials(jobs, world), eval_share=eval_share)
    run_jobs(jobs, world, world, scheduler, watchers)
    return Schedule(world.clock, lower_bound(trials, nodes, evaluations), tuple(world.spans))


def lower_bound(
    trials: Sequence[SimulatedTrial], nodes: Mapping[str, Resources],
    evaluations: Callable[[str, int], Sequence[EvalJob]],
) -> float:  # fmt: skip
    """Seconds: all work on all devices without a gap, or the longest trial and its last evaluation."""
    total, work, longest = sum(nodes.values(), NOTHING), NOTHING, 0.0
    for trial in trials:
        jobs = [job for _, nimg in trial.exports for job in evaluations(trial.job.key, nimg)]
        work = work + trial.job.shapes[0].total * trial.job.seconds
        work = sum((job.shapes[0].total * job.seconds for job in jobs), work)
        last = [job.seconds for job in jobs if job.nimg == trial.exports[-1][1]]
        longest = max(longest, trial.job.seconds + max(last, default=0.0))
    rates = [(work.cpus, total.cpus), (work.gpus, total.gpus)]
    return max(longest, *(need / there for need, there in rates if there), 0.0)


def simulated_eval(trial: str, nimg: int, *, shape: Shape, seconds: float, priority: int = 0) -> EvalJob:
    """An evaluation that only takes time."""
    nowhere = Path("/nonexistent")
    return EvalJob(f"{trial}/{nimg}", trial, nimg, nowhere, nowhere, None, (0, 1), (shape,), seconds, priority)
