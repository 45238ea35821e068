"""Which job starts next, and on which nodes: decisions only, no clock, no files, no Ray.

By priority first. Of equal priority, evaluations go before trials that wait while they hold no more than their share of
the cluster (their points are what the study is for, and they are short); beyond it they only take what no trial can
use. Trials that were interrupted go first, then the longest, so that the last to end is not one that began late.

The first trial that finds no room gets a reservation on the nodes where it will fit soonest. Other trials go past it
only where they do not delay it, evaluations where they delay it by no more than their share of its own time. So wide
trials are not starved by narrow jobs, and no device idles that a job could use (EASY backfilling, Lifka 1995).

A job that failed through no fault of the user's is tried again after a growing pause (`troubles.py`).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field

from cluster.scheduling.jobs import EvalJob, Job, Outcome, Placement, Resources, Shape, TrialJob
from cluster.scheduling.pool import Pool, can_ever_fit
from cluster.scheduling.troubles import Failure, Retry, RetryPolicy, Troubles

# What a cluster that has lost devices gets to have them back, before a trial goes on with fewer.
SHRINK_SECONDS = 120.0
_PROBE_SECONDS = 10.0  # what one job gets to show that a disk which was full has room again
_OVERDUE = 0.1  # of its expected time: how much longer a job that should have ended is given


@dataclass(eq=False)
class _Running:
    placement: Placement
    began: float
    ends: float  # expected
    number: int  # in order of starting

    @property
    def end(self) -> tuple[float, int]:
        return self.ends, self.number


@dataclass(order=True)
class _Waiting:
    rank: tuple[float, ...]
    job: Job = field(compare=False)


@dataclass(frozen=True)
class _Reservation:
    """Where and when the first trial that found no room will fit."""

    job: Job
    at: float
    deadline: float  # when evaluations at the latest must have made room for it
    spare: dict[str, Resources]  # by node: what others may still hold then


class Scheduler:
    """Keeps every job's state and decides."""

    def __init__(
        self, trials: Iterable[TrialJob] = (), *, retry: RetryPolicy | None = None, eval_share: float = 0.25,
        shrink_seconds: float = SHRINK_SECONDS,
    ) -> None:  # fmt: skip
        """`eval_share`: of the devices, what evaluations may hold while trials wait; one may always run."""
        self._troubles = Troubles(retry or RetryPolicy())
        self._eval_share, self._shrink_seconds = eval_share, shrink_seconds
        self._waiting: dict[str, Job] = {}  # those in queues or paused
        self._queues: dict[tuple[bool, tuple[Shape, ...]], list[_Waiting]] = {}  # heaps, by kind and shapes
        self._paused: list[tuple[float, int, Job]] = []  # heap, by when
        self._known: set[str] = set()  # evaluations ever added
        self._number = 0
        self._starts: dict[str, int] = {}
        self._pool = Pool()
        self._running: dict[str, _Running] = {}
        self._by_end: list[_Running] = []  # in order of their expected ends
        self._training: dict[str, None] = {}  # running trials
        self._eval_devices = 0.0
        self._num_trials = 0  # waiting
        self._ending: dict[str, str] = {}  # running jobs that were asked to end, and why
        self._wanted_again: set[str] = set()  # of those, the ones that are to go on when they have ended
        self._pace = {False: _Pace(), True: _Pace()}  # of trials, of evaluations
        self._impossible: dict[Shape, float] = {}  # since when no set of nodes has had such a one
        self._reservation: _Reservation | None = None
        self._settled = False  # all that can start has started
        self._disk = "fine"  # or "full", or "probed" by one job
        self._disk_looked_at = 0.0  # when it may be tried again
        self.failures: list[Failure] = []
        self.retries: list[Retry] = []
        self.num_done = 0
        self.add_trials(trials)

    # ---- what there is to do ------------------------------------------------------------------------------------

    def add_trials(self, jobs: Iterable[TrialJob]) -> None:
        """Let trials wait. One that waits already is replaced (its priority may have changed), one that runs stays."""
        for job in jobs:
            if job.key not in self._running:
                self._wait(job)
            elif self._ending.pop(job.key, None) is not None:
                self._wanted_again.add(job.key)

    def add_evaluations(self, jobs: Iterable[EvalJob]) -> None:
        """Let evaluations wait; those already known are left out."""
        for job in jobs:
            if job.key not in self._known:
                self._known.add(job.key)
                self._wait(job)

    def replace_evaluations(self, trial: str, jobs: Iterable[EvalJob]) -> None:
        """These are a trial's evaluations now: others that wait are forgotten."""
        wanted = {job.key: job for job in jobs}
        waiting = [key for key, job in self._waiting.items() if isinstance(job, EvalJob) and job.trial == trial]
        for key in waiting:
            if key not in wanted:
                self._forget(key)
                self._known.discard(key)
        self.add_evaluations(wanted.values())

    def drop(self, trial: str, why: str) -> bool:
        """Forget a trial and its waiting evaluations. True: it runs, and must be told to end."""
        for key in [k for k, job in self._waiting.items() if k == trial or _trial_of(job) == trial]:
            self._forget(key)
            self._known.discard(key)
        if trial in self._running:
            self._ending[trial] = why
        return trial in self._running

    @property
    def running(self) -> dict[str, Placement]:
        return {key: entry.placement for key, entry in self._running.items()}

    @property
    def running_trials(self) -> KeysView[str]:
        """A live view."""
        return self._training.keys()

    @property
    def finished(self) -> bool:
        return not (self._running or self._waiting)

    @property
    def waiting(self) -> Mapping[str, Job]:
        """By key: those that have not started, or will start again."""
        return self._waiting

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Trials and evaluations that wait."""
        return self._num_trials, len(self._waiting) - self._num_trials

    def demand(self) -> list[Shape]:
        """What all that runs or waits would take, as it is wanted."""
        jobs = [entry.placement.job for entry in self._running.values()] + list(self._waiting.values())
        return [job.shapes[0] for job in jobs]

    def homeless(self, nodes: Mapping[str, Resources]) -> list[Job]:
        """Of each kind of job that waits, the first if no set of living nodes could ever hold it."""
        heads = [queue[0].job for queue in self._live_queues()]
        return [job for job in heads if not any(can_ever_fit(shape, nodes) for shape in job.shapes)]

    # ---- decisions ----------------------------------------------------------------------------------------------

    def choose(self, nodes: Mapping[str, Resources], now: float) -> list[Placement]:
        """The jobs to start now on what is free of `nodes`; they count as running from here on."""
        while self._paused and self._paused[0][0] <= now:
            _, _, job = heapq.heappop(self._paused)
            if self._waiting.get(job.key) is job:
                self._enqueue(job)
        if self._pool.set_nodes(nodes):
            self._settled, self._reservation = False, None
        if (self._settled and not self._impossible) or not self._disk_lets_start(now):
            return []
        if self._reservation is not None and self._waiting.get(self._reservation.job.key) is not self._reservation.job:
            self._reservation = None
        placed: list[Placement] = []
        open_queues, blocked = list(self._live_queues()), False
        while open_queues:
            queue = min(open_queues, key=lambda q: self._order(q[0]))
            job = queue[0].job
            shape = self._usable_shape(job, now)
            where = self._room(job, shape, now) if shape else None
            if shape is not None and where is None and not blocked and isinstance(job, TrialJob):
                self._reserve(job, shape, now)
                where = self._room(job, shape, now)  # another trial's reservation may have been all that was in its way
                blocked = where is None
            if shape is None or where is None:
                open_queues.remove(queue)
                continue
            placed.append(self._start(job, shape, where, now))
            heapq.heappop(queue)
            self._drop_dead(queue)
            if not queue:
                open_queues.remove(queue)
            if self._disk == "probed":
                return placed
        if not blocked:
            self._reservation = None
        self._settled = True
        return placed

    def _disk_lets_start(self, now: float) -> bool:
        """A full disk is everybody's: after a pause one job tries it, and the others follow where that goes well."""
        if self._disk == "fine":
            return True
        if now < self._disk_looked_at:
            return False
        self._disk = "probed" if self._disk == "full" else "fine"
        self._disk_looked_at = now + _PROBE_SECONDS
        return True

    def ended(
        self,
        outcome: Outcome,
        now: float,
        *,
        progress: int = 0,
        remedy: str | None = None,
        again: TrialJob | None = None,
    ) -> Retry | Failure | None:
        """Note how a job ended. Returns what became of it when it is not done.

        Args:
            again: the trial as it is wanted now, and with what is left of it, for when it is tried again.
            progress: images that the trial has saved; more than at its last failure makes that forgotten.
            remedy: what was changed so that it does not run out of memory again.
        """
        entry = self._leave(outcome.job.key)
        job, why = entry.placement.job, self._ending.pop(outcome.job.key, None)
        next_job = again or job
        if outcome.status == "done":
            self.num_done += 1
            self._troubles.forget(job.key)
            if entry.placement.attempt == 1 and entry.placement.shape == job.shapes[0]:
                self._pace[isinstance(job, EvalJob)].learn(job.seconds, now - entry.began)
            return None
        if why is not None:
            return Failure(job, entry.placement.attempt, why, "cancelled")
        if job.key in self._wanted_again:
            self._wanted_again.discard(job.key)
            self._wait(next_job)
            return Retry(job, entry.placement.attempt, 0.0, "it is wanted again", outcome.status)
        verdict = self._troubles.verdict(outcome, entry.placement.attempt, now, progress=progress, remedy=remedy)
        if isinstance(verdict, Failure):
            self.failures.append(verdict)
        else:
            self.retries.append(verdict)
            self._wait(next_job, now + verdict.pause)
            if verdict.status == "no_space":
                self._disk, self._disk_looked_at = "full", now + verdict.pause
        return verdict

    # ---- the queues ---------------------------------------------------------------------------------------------

    def _wait(self, job: Job, not_before: float | None = None) -> None:
        if job.key in self._waiting:
            self._forget(job.key)
        self._waiting[job.key] = job
        self._num_trials += isinstance(job, TrialJob)
        if not_before is None:
            self._enqueue(job)
        else:
            self._number += 1
            heapq.heappush(self._paused, (not_before, self._number, job))

    def _enqueue(self, job: Job) -> None:
        self._number += 1
        length = -_about(job.seconds) if isinstance(job, TrialJob) else 0.0
        begun = isinstance(job, TrialJob) and job.key in self._starts  # it does not lose its turn by an accident
        queue = self._queues.setdefault((isinstance(job, EvalJob), job.shapes), [])
        heapq.heappush(queue, _Waiting((-job.priority, not begun, length, self._number), job))
        self._settled = False

    def _forget(self, key: str) -> None:
        """Its entries in heaps are skipped later."""
        self._num_trials -= isinstance(self._waiting.pop(key), TrialJob)

    def _drop_dead(self, queue: list[_Waiting]) -> None:
        while queue and self._waiting.get(queue[0].job.key) is not queue[0].job:
            heapq.heappop(queue)

    def _live_queues(self) -> Iterator[list[_Waiting]]:
        for queue in self._queues.values():
            self._drop_dead(queue)
            if queue:
                yield queue

    def _order(self, head: _Waiting) -> tuple[float, ...]:
        job, (priority, *rest) = head.job, head.rank
        if isinstance(job, TrialJob):
            return (priority, 1, *rest)
        need = job.shapes[0].total
        most = self._eval_share * (self._pool.total.gpus if need.gpus else self._pool.total.cpus)
        within = self._eval_devices == 0 or self._eval_devices + need.devices <= most + 1e-9
        return (priority, 0 if within else 2, *rest)

    # ---- nodes --------------------------------------------------------------------------------------------------

    def _usable_shape(self, job: Job, now: float) -> Shape | None:
        """The first of the job's shapes that the cluster can hold when it is empty.

        One after the first only when the cluster has been too small for those before it for a while.
        """
        for shape in job.shapes:
            if self._pool.could_hold(shape):
                self._impossible.pop(shape, None)
                return shape
            since = self._impossible.setdefault(shape, now)
            if now - since < self._shrink_seconds:
                return None
        return None

    def _room(self, job: Job, shape: Shape, now: float) -> tuple[str, ...] | None:
        """The nodes to start it on. It may not delay the trial that has the reservation, unless it is more urgent."""
        reservation = self._reservation
        if reservation is None or job is reservation.job or job.priority > reservation.job.priority:
            return self._pool.find(shape)
        if now + self._expected(job, shape) <= (reservation.deadline if isinstance(job, EvalJob) else reservation.at):
            return self._pool.find(shape)
        spare = reservation.spare
        return self._pool.find(shape, lambda node: node not in spare or shape.per_node.fits_in(spare[node]))

    def _reserve(self, job: Job, shape: Shape, now: float) -> None:
        """Find the nodes on which so much becomes free soonest, as far as ends can be foreseen, and when.

        What was reserved stays so until then: a nearer end elsewhere lets the job start sooner anyway.
        """
        before = self._reservation if self._reservation is not None and self._reservation.job is job else None
        if before is not None and before.at > now:
            return
        self._delay_the_overdue(now)
        free: dict[str, Resources] = {}
        chosen = {node: None for node in self._pool.nodes if shape.per_node.fits_in(self._pool.free(node))}
        at, later = now, iter(self._by_end)
        while len(chosen) < shape.num_nodes and (entry := next(later, None)) is not None:
            for node in entry.placement.nodes:
                if node in self._pool.nodes and node not in chosen:
                    free[node] = free.get(node, self._pool.free(node)) + entry.placement.shape.per_node
                    if shape.per_node.fits_in(free[node]):
                        chosen[node], at = None, entry.ends
        nodes = list(chosen)[-shape.num_nodes :]
        deadline = before.deadline if before is not None else at + self._eval_share * self._expected(job, shape)
        self._reservation = _Reservation(
            job, at, deadline, {node: free.get(node, self._pool.free(node)) - shape.per_node for node in nodes}
        )

    def _delay_the_overdue(self, now: float) -> None:
        """Nobody knows when a job that should have ended will; soon is a better guess than now."""
        overdue: list[_Running] = []
        for entry in self._by_end:
            if entry.ends > now:
                break
            overdue.append(entry)
        del self._by_end[: len(overdue)]
        for entry in overdue:
            entry.ends = now + max(1.0, _OVERDUE * (entry.ends - entry.began))
            insort(self._by_end, entry, key=lambda e: e.end)

    def _start(self, job: Job, shape: Shape, where: tuple[str, ...], now: float) -> Placement:
        self._forget(job.key)
        if self._reservation is not None and self._reservation.job is job:
            self._reservation = None
        attempt = self._starts[job.key] = self._starts.get(job.key, 0) + 1
        placement = Placement(job, shape, where, attempt)
        self._number += 1
        entry = self._running[job.key] = _Running(placement, now, now + self._expected(job, shape), self._number)
        insort(self._by_end, entry, key=lambda e: e.end)
        for node in where:
            self._pool.take(node, job.key, shape.per_node)
            reservation = self._reservation
            if reservation is not None and node in reservation.spare and entry.ends > reservation.at:
                reservation.spare[node] = reservation.spare[node] - shape.per_node
        if isinstance(job, EvalJob):
            self._eval_devices += shape.total.devices
        else:
            self._training[job.key] = None
        return placement

    def _leave(self, key: str) -> _Running:
        entry = self._running.pop(key)
        del self._by_end[bisect_left(self._by_end, entry.end, key=lambda e: e.end)]
        for node in entry.placement.nodes:
            self._pool.give(node, key)
        if isinstance(entry.placement.job, EvalJob):
            self._eval_devices = max(0.0, self._eval_devices - entry.placement.shape.total.devices)
        else:
            del self._training[key]
        self._settled = False
        return entry

    def _expected(self, job: Job, shape: Shape) -> float:
        return Placement(job, shape, ()).seconds * self._pace[isinstance(job, EvalJob)].factor


class _Pace:
    """How long jobs take, as a multiple of what was expected."""

    def __init__(self) -> None:
        self._expected = self._measured = 0.0

    def learn(self, expected: float, measured: float) -> None:
        self._expected += expected
        self._measured += max(0.0, measured)

    @property
    def factor(self) -> float:
        return self._measured / self._expected if self._expected and self._measured else 1.0


def first_that_never_fits(jobs: Iterable[Job], nodes: Mapping[str, Resources]) -> Job | None:
    """A job that these nodes could not hold in any of its shapes."""
    seen: dict[tuple[Shape, ...], bool] = {}
    for job in jobs:
        if job.shapes not in seen:
            seen[job.shapes] = any(can_ever_fit(shape, nodes) for shape in job.shapes)
        if not seen[job.shapes]:
            return job
    return None


def _trial_of(job: Job) -> str:
    return job.trial if isinstance(job, EvalJob) else job.key


def _about(seconds: float) -> float:
    """Times within some ten per cent are equal, and the study's own order decides: rounding of budgets should not."""
    return round(20 * math.log10(max(seconds, 1e-9))) / 20
