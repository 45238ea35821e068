"""Which job starts next: decisions only, no clock, no files, no Ray.

Evaluations go before new trials when devices are free (they are short, and their points are what the study is for);
trials go longest first, so that the last to end is not one that began late; a job that fits goes past one that does
not. A job that failed through no fault of the user's is tried again after a growing pause, a few times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.jobs import EvalJob, Job, Outcome, Resources, TrialJob


@dataclass
class _Waiting:
    job: Job
    not_before: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A job that failed for good."""

    job: Job
    attempts: int
    message: str


@dataclass(frozen=True)
class Retry:
    """A failure that will be tried again."""

    job: Job
    attempt: int  # that failed, from 1
    pause: float  # seconds
    message: str


class Scheduler:
    """Keeps every job's state and decides."""

    def __init__(self, trials: Iterable[TrialJob], *, attempts: int = 3, first_pause: float = 5.0) -> None:
        self._trials = [_Waiting(job) for job in sorted(trials, key=lambda job: -_about(job.seconds))]
        self._evaluations: list[_Waiting] = []
        self._known: set[str] = set()  # evaluations ever added
        self._failed_attempts: dict[str, int] = {}
        self._attempts, self._first_pause = attempts, first_pause
        self.running: dict[str, Job] = {}
        self.failures: list[Failure] = []
        self.retries: list[Retry] = []
        self.num_done = 0

    def add_evaluations(self, jobs: Iterable[EvalJob]) -> None:
        """Let evaluations wait; those already known are left out."""
        for job in jobs:
            if job.key not in self._known:
                self._known.add(job.key)
                self._evaluations.append(_Waiting(job))

    @property
    def finished(self) -> bool:
        return not (self.running or self._trials or self._evaluations)

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Trials and evaluations that have not started."""
        return len(self._trials), len(self._evaluations)

    def choose(self, total: Resources, now: float) -> list[Job]:
        """The jobs to start now on what is free of `total`; they count as running from here on."""
        free = total
        for job in self.running.values():
            free = free - job.resources
        chosen: list[Job] = []
        for queue in (self._evaluations, self._trials):
            left: list[_Waiting] = []
            for entry in queue:
                if entry.not_before <= now and entry.job.resources.fits_in(free):
                    free = free - entry.job.resources
                    chosen.append(entry.job)
                else:
                    left.append(entry)
            queue[:] = left
        self.running |= {job.key: job for job in chosen}
        return chosen

    def ended(self, outcome: Outcome, now: float) -> Retry | Failure | None:
        """Note how a job ended. Returns what became of it when it failed."""
        job = self.running.pop(outcome.job.key)
        if outcome.status == "done":
            self.num_done += 1
            return None
        attempt = self._failed_attempts[job.key] = self._failed_attempts.get(job.key, 0) + 1
        if attempt >= self._attempts:
            failure = Failure(job, attempt, outcome.message)
            self.failures.append(failure)
            return failure
        pause = self._first_pause * 2.0 ** (attempt - 1)
        queue = self._evaluations if isinstance(job, EvalJob) else self._trials
        queue.insert(0, _Waiting(job, now + pause))
        retry = Retry(job, attempt, pause, outcome.message)
        self.retries.append(retry)
        return retry


def _about(seconds: float) -> float:
    """Times within some ten per cent are equal, and the study's own order decides: rounding of budgets should not."""
    return round(20 * math.log10(max(seconds, 1e-9))) / 20


def first_that_never_fits(jobs: Iterable[Job], largest: Resources) -> Job | None:
    """A job that needs more than `largest`, what the cluster could give one job at best."""
    return next((job for job in jobs if not job.resources.fits_in(largest)), None)
