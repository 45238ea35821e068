"""Which job starts next, and on which nodes: decisions only, no clock, no files, no Ray.

By priority first. Of equal priority, evaluations go before trials that wait while they hold no more than their share of
the cluster (their points are what the study is for, and they are short); beyond it they only take what no trial can
use. Trials go longest first, so that the last to end is not one that began late. The first job that finds no room gets
a reservation on the nodes where it will fit soonest; others go past it only where they do not delay it. So wide jobs
are not starved by narrow ones, and no device idles that a job could use meanwhile (EASY backfilling: Lifka 1995).

A job that failed through no fault of the user's is tried again after a growing pause (`troubles.py`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cluster.jobs import EvalJob, Job, Outcome, Placement, Resources, Shape, TrialJob
from cluster.troubles import Failure, Retry, RetryPolicy, Troubles

# What a cluster that has lost devices gets to have them back, before a trial goes on with fewer.
SHRINK_SECONDS = 120.0
NOTHING = Resources()


@dataclass
class _Running:
    placement: Placement
    began: float
    ends: float  # expected


@dataclass(order=True)
class _Waiting:
    rank: tuple[float, ...]
    job: Job = field(compare=False)


@dataclass(frozen=True)
class _Reservation:
    """Where and when the first job that found no room will fit."""

    at: float
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
        self._running: dict[str, _Running] = {}
        self._on_node: dict[str, dict[str, _Running]] = {}
        self._used: dict[str, Resources] = {}
        self._eval_devices = 0.0
        self._num_trials = 0  # waiting
        self._ending: dict[str, str] = {}  # running jobs that were asked to end, and why
        self._pace = {False: _Pace(), True: _Pace()}  # of trials, of evaluations
        self._impossible: dict[Shape, float] = {}  # since when no set of nodes has had such a one
        self._settled: Mapping[str, Resources] | None = None  # the nodes for which all that could start has started
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

    def add_evaluations(self, jobs: Iterable[EvalJob]) -> None:
        """Let evaluations wait; those already known are left out."""
        for job in jobs:
            if job.key not in self._known:
                self._known.add(job.key)
                self._wait(job)

    def drop(self, trial: str, why: str) -> bool:
        """Forget a trial and its waiting evaluations. True: it runs, and must be told to end."""
        for key in [k for k, job in self._waiting.items() if k == trial or _trial_of(job) == trial]:
            self._forget(key)
        if trial in self._running:
            self._ending[trial] = why
        return trial in self._running

    @property
    def running(self) -> dict[str, Placement]:
        return {key: entry.placement for key, entry in self._running.items()}

    @property
    def running_trials(self) -> list[str]:
        return [key for key, entry in self._running.items() if isinstance(entry.placement.job, TrialJob)]

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
        if self._settled is not None and self._settled == nodes and not self._impossible:
            return []
        free = {node: total - self._used.get(node, NOTHING) for node, total in nodes.items()}
        total = sum(nodes.values(), NOTHING)
        open_queues = list(self._live_queues())
        reservation: _Reservation | None = None
        placed: list[Placement] = []
        while open_queues:
            queue = min(open_queues, key=lambda q: self._order(q[0], total))
            job = queue[0].job
            shape = self._usable_shape(job, nodes, now)
            where = self._room(job, shape, free, reservation, now) if shape else None
            if shape is None or where is None:
                open_queues.remove(queue)
                if shape is not None and reservation is None:
                    reservation = self._reserve(shape, nodes, now)
                continue
            placed.append(self._start(job, shape, where, now))
            for node in where:
                free[node] = free[node] - shape.per_node
                if reservation and node in reservation.spare and now + self._expected(job, shape) > reservation.at:
                    reservation.spare[node] = reservation.spare[node] - shape.per_node
            heapq.heappop(queue)
            self._drop_dead(queue)
            if not queue:
                open_queues.remove(queue)
        self._settled = dict(nodes)
        return placed

    def ended(
        self, outcome: Outcome, now: float, *, progress: int = 0, remedy: str | None = None
    ) -> Retry | Failure | None:
        """Note how a job ended. Returns what became of it when it is not done.

        Args:
            progress: images that the trial has saved; more than at its last failure makes that forgotten.
            remedy: what was changed so that it does not run out of memory again.
        """
        entry = self._leave(outcome.job.key)
        job, why = entry.placement.job, self._ending.pop(outcome.job.key, None)
        if outcome.status == "done":
            self.num_done += 1
            self._troubles.forget(job.key)
            if entry.placement.attempt == 1 and entry.placement.shape == job.shapes[0] and progress == 0:
                self._pace[isinstance(job, EvalJob)].learn(job.seconds, now - entry.began)
            return None
        if why is not None:
            return Failure(job, entry.placement.attempt, why, "cancelled")
        verdict = self._troubles.verdict(outcome, entry.placement.attempt, now, progress=progress, remedy=remedy)
        if isinstance(verdict, Failure):
            self.failures.append(verdict)
        else:
            self.retries.append(verdict)
            self._wait(job, now + verdict.pause)
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
        queue = self._queues.setdefault((isinstance(job, EvalJob), job.shapes), [])
        heapq.heappush(queue, _Waiting((-job.priority, length, self._number), job))
        self._settled = None

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

    def _order(self, head: _Waiting, total: Resources) -> tuple[float, ...]:
        job, (priority, *rest) = head.job, head.rank
        if isinstance(job, TrialJob):
            return (priority, 1, *rest)
        need = job.shapes[0].total
        most = self._eval_share * (total.gpus if need.gpus else total.cpus)
        within = self._eval_devices == 0 or self._eval_devices + need.devices <= most + 1e-9
        return (priority, 0 if within else 2, *rest)

    # ---- nodes --------------------------------------------------------------------------------------------------

    def _usable_shape(self, job: Job, nodes: Mapping[str, Resources], now: float) -> Shape | None:
        """The first of the job's shapes that the cluster can hold when it is empty.

        One after the first only when the cluster has been too small for those before it for a while.
        """
        for shape in job.shapes:
            if can_ever_fit(shape, nodes):
                self._impossible.pop(shape, None)
                return shape
            since = self._impossible.setdefault(shape, now)
            if now - since < self._shrink_seconds:
                return None
        return None

    def _room(
        self, job: Job, shape: Shape, free: Mapping[str, Resources], reservation: _Reservation | None, now: float
    ) -> tuple[str, ...] | None:
        """The nodes to start it on: those that it fills best."""
        fitting = [node for node, left in free.items() if shape.per_node.fits_in(left)]
        if reservation is not None and now + self._expected(job, shape) > reservation.at:
            spare = reservation.spare
            fitting = [node for node in fitting if node not in spare or shape.per_node.fits_in(spare[node])]
        if len(fitting) < shape.num_nodes:
            return None
        tightest = heapq.nsmallest(shape.num_nodes, fitting, key=lambda node: (free[node].gpus, free[node].cpus))
        return tuple(tightest)

    def _reserve(self, shape: Shape, nodes: Mapping[str, Resources], now: float) -> _Reservation:
        """The nodes on which so much becomes free soonest, as far as ends can be foreseen."""
        moments: list[tuple[float, str]] = []
        for node, total in nodes.items():
            free = total - self._used.get(node, NOTHING)
            when = now
            for entry in sorted(self._on_node.get(node, {}).values(), key=lambda e: e.ends):
                if shape.per_node.fits_in(free):
                    break
                free, when = free + entry.placement.shape.per_node, max(now, entry.ends)
            if shape.per_node.fits_in(free):
                moments.append((when, node))
        chosen = heapq.nsmallest(shape.num_nodes, moments)
        at = chosen[-1][0] if chosen else now
        spare = {}
        for _, node in chosen:
            busy = [e.placement.shape.per_node for e in self._on_node.get(node, {}).values() if e.ends > at]
            spare[node] = nodes[node] - sum(busy, NOTHING) - shape.per_node
        return _Reservation(at, spare)

    def _start(self, job: Job, shape: Shape, where: tuple[str, ...], now: float) -> Placement:
        self._forget(job.key)
        attempt = self._starts[job.key] = self._starts.get(job.key, 0) + 1
        placement = Placement(job, shape, where, attempt)
        entry = self._running[job.key] = _Running(placement, now, now + self._expected(job, shape))
        for node in where:
            self._on_node.setdefault(node, {})[job.key] = entry
            self._used[node] = self._used.get(node, NOTHING) + shape.per_node
        self._eval_devices += shape.total.devices if isinstance(job, EvalJob) else 0.0
        return placement

    def _leave(self, key: str) -> _Running:
        entry = self._running.pop(key)
        shape = entry.placement.shape
        for node in entry.placement.nodes:
            del self._on_node[node][key]
            # Nothing left is exactly nothing, whatever was added and taken away.
            self._used[node] = self._used[node] - shape.per_node if self._on_node[node] else NOTHING
        if isinstance(entry.placement.job, EvalJob):
            self._eval_devices = max(0.0, self._eval_devices - shape.total.devices)
        self._settled = None
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


def can_ever_fit(shape: Shape, nodes: Mapping[str, Resources]) -> bool:
    """Are there nodes enough of that size, were they empty?"""
    found = 0
    for total in nodes.values():
        found += shape.per_node.fits_in(total)
        if found >= shape.num_nodes:
            return True
    return False


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
