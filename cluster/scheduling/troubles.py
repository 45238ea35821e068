"""What becomes of a job that did not end well: tried again, when, or given up.

Each kind of trouble has its own patience; saving more images than at the last one makes all of it forgotten, so a trial
on machines that are taken away every hour goes on for weeks, and one that fails at its first step does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.scheduling.jobs import Job, Outcome, Status


@dataclass(frozen=True)
class RetryPolicy:
    """Patience, each without progress in between."""

    attempts: int = 5  # starts that end by a failure of their own
    losses: int = 20  # starts that end with their node or worker
    first_pause: float = 5.0  # seconds; doubled each time
    longest_pause: float = 300.0
    disk_wait: float = 86400.0  # seconds that a full disk is waited for


@dataclass(frozen=True)
class Failure:
    """A job that has ended for good, unfinished."""

    job: Job
    attempts: int
    message: str
    state: Literal["failed", "diverged", "cancelled"] = "failed"


@dataclass(frozen=True)
class Retry:
    """A job that will be tried again."""

    job: Job
    attempt: int  # that ended, from 1
    pause: float  # seconds
    message: str
    status: Status = "failed"


@dataclass
class _Record:
    progress: int = -1
    failures: int = 0
    losses: int = 0
    pauses: int = 0
    full_since: float | None = None


class Troubles:
    """What each job has been through since it last moved on."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._records: dict[str, _Record] = {}

    def forget(self, key: str) -> None:
        self._records.pop(key, None)

    def verdict(
        self, outcome: Outcome, attempt: int, now: float, *, progress: int, remedy: str | None
    ) -> Retry | Failure:
        """`attempt`: its number; `progress`: images saved; `remedy`: what was done against running out of memory."""
        job, message = outcome.job, outcome.message
        if outcome.status == "diverged":
            return Failure(job, attempt, message, "diverged")
        if outcome.status == "out_of_memory" and remedy is not None:
            return Retry(job, attempt, 0.0, f"{message}; {remedy}", outcome.status)
        record = self._records.get(job.key)
        if record is None or progress > record.progress:
            record = self._records[job.key] = _Record(progress)
        if self._exhausted(record, outcome.status, now):
            return Failure(job, attempt, message)
        record.pauses += 1
        pause = min(self._policy.longest_pause, self._policy.first_pause * 2.0 ** min(record.pauses - 1, 40))
        return Retry(job, attempt, pause, message, outcome.status)

    def _exhausted(self, record: _Record, status: Status, now: float) -> bool:
        """Count this one, and say whether it was one too many."""
        if status == "no_space":
            record.full_since = now if record.full_since is None else record.full_since
            return now - record.full_since > self._policy.disk_wait
        record.full_since = None
        if status in ("lost", "stopped"):  # nobody here asked it to stop: its machine was taken away
            record.losses += 1
            return record.losses >= self._policy.losses
        if status == "out_of_memory":
            return True
        record.failures += 1
        return record.failures >= self._policy.attempts
