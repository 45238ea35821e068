"""A backend without machines: jobs take their expected time on a clock that jumps. For plans, and for tests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.driver import Watcher, run_jobs
from cluster.jobs import EvalJob, Job, Outcome, Resources, Status, TrialJob
from cluster.scheduler import Scheduler


@dataclass(frozen=True)
class SimulatedTrial:
    """A trial and the share of its time after which each export exists."""

    job: TrialJob
    exports: tuple[tuple[float, int], ...]  # (share, nimg)


@dataclass
class SimulatedCluster:
    """Backend and files in one: what a job 'did' is a fact of the simulated world."""

    resources: Resources
    trials: dict[str, SimulatedTrial]
    evaluations: Callable[[str, int], Sequence[EvalJob]] = lambda trial, nimg: ()
    fate: Callable[[Job, int], Status] = lambda job, attempt: "done"  # by job and attempt, from 1
    clock: float = 0.0
    done: set[str] = field(default_factory=set)  # keys of trials and evaluations
    log: list[tuple[float, str, str]] = field(default_factory=list)  # (time, "start" | status, key)
    _running: list[tuple[float, int, Job]] = field(default_factory=list)  # heap of (end, number, job)
    _number: int = 0
    _attempts: dict[str, int] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)
    _exports: dict[str, set[int]] = field(default_factory=dict)

    # ---- the backend --------------------------------------------------------------------------------------------

    def total(self) -> Resources:
        return self.resources

    def largest(self) -> Resources:
        return self.total()  # simulated clusters are one node

    def now(self) -> float:
        return self.clock

    def start(self, job: Job) -> None:
        self._attempts[job.key] = self._attempts.get(job.key, 0) + 1
        self._number += 1
        heapq.heappush(self._running, (self.clock + job.seconds, self._number, job))
        self._began[job.key] = self.clock
        self.log.append((self.clock, "start", job.key))

    def wait(self, seconds: float) -> list[Outcome]:
        """Jumps to the next moment at which something ends or an export appears."""
        moments = [self._running[0][0]] if self._running else [self.clock + seconds]
        moments += [m for _, _, job in self._running if isinstance(job, TrialJob) for m in self._export_times(job)]
        self.clock = max(self.clock, min(moments))
        self._appear()
        outcomes = []
        while self._running and self._running[0][0] <= self.clock:
            _, _, job = heapq.heappop(self._running)
            status = self.fate(job, self._attempts[job.key])
            if status == "done":
                self.done.add(job.key)
            self.log.append((self.clock, status, job.key))
            outcomes.append(Outcome(job, status, "" if status == "done" else f"simulated {status}"))
        return outcomes

    def stop(self) -> None:
        for _, _, job in self._running:
            self.log.append((self.clock, "stopped", job.key))
        self._running.clear()

    def close(self) -> None:
        self.stop()

    # ---- the files ----------------------------------------------------------------------------------------------

    def trial_done(self, trial: str) -> bool:
        return trial in self.done

    def missing_evaluations(self, trial: str) -> list[EvalJob]:
        exports = sorted(self._exports.get(trial, ()))
        return [job for nimg in exports for job in self.evaluations(trial, nimg) if job.key not in self.done]

    def _export_times(self, job: TrialJob) -> list[float]:
        began = self._began[job.key]
        return [
            began + share * job.seconds
            for share, nimg in self.trials[job.key].exports
            if nimg not in self._exports.get(job.key, ())
        ]

    def _appear(self) -> None:
        for _, _, job in self._running:
            if isinstance(job, TrialJob):
                for share, nimg in self.trials[job.key].exports:
                    if self._began[job.key] + share * job.seconds <= self.clock:
                        self._exports.setdefault(job.key, set()).add(nimg)


def simulated_makespan(
    trials: Sequence[SimulatedTrial], resources: Resources, evaluations: Callable[[str, int], Sequence[EvalJob]]
) -> float:
    """Seconds from the first start to the last end, with the real scheduler."""
    jobs = [trial.job for trial in trials]
    world = SimulatedCluster(resources, {trial.job.key: trial for trial in trials}, evaluations)
    run_jobs(jobs, world, world, Scheduler(jobs), Watcher())
    return world.clock


def simulated_eval(trial: str, nimg: int, *, resources: Resources, seconds: float) -> EvalJob:
    """An evaluation that only takes time."""
    nowhere = Path("/nonexistent")
    return EvalJob(f"{trial}/{nimg}", trial, nimg, nowhere, nowhere, None, (0, 1), resources, seconds)
