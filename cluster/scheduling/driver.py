"""The study's loop: start what should run, note what ended, until nothing is left. Knows neither Ray nor files' layout.

All truth is in files, so the loop may die at any time: started again it finds what is done and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.scheduling.jobs import Backend, Changes, EvalJob, Job, Outcome, Placement, Resources, StudyFiles, TrialJob
from cluster.scheduling.scheduler import Scheduler, first_that_never_fits
from cluster.scheduling.troubles import Failure, Retry
from data_pipeline.errors import UserError

_POLL_SECONDS = 0.5
_STORAGE_SECONDS = 120.0  # what a shared file system may take to show here what was written elsewhere


class Watcher:
    """What the loop tells while it works; each method may be left out."""

    def started(self, placement: Placement) -> None:
        """A job has been given its nodes."""

    def ended(self, outcome: Outcome, verdict: Retry | Failure | None) -> None:
        """A job has ended; `verdict`: what becomes of it where it is not done."""

    def nodes(self, joined: Sequence[str], lost: Sequence[str]) -> None:
        """Nodes have come or gone, by name."""

    def told(self, text: str) -> None:
        """Something else that whoever watches wants to know."""

    def tick(self, scheduler: Scheduler, nodes: Mapping[str, Resources]) -> None:
        """Called at every turn of the loop."""


@dataclass(frozen=True)
class Summary:
    """What a call of the driver did."""

    stopped: bool  # on request, before the end
    num_done: int
    failures: list[Failure] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)


def waiting_trials(trials: Iterable[TrialJob], files: StudyFiles) -> list[TrialJob]:
    """The trials that no file proves complete, or ended for good."""
    return [trial for trial in trials if not files.trial_done(trial.key) and files.verdict(trial.key) is None]


def is_complete(trials: Iterable[TrialJob], files: StudyFiles) -> bool:
    """Is there nothing left to train or to evaluate?"""
    trials = list(trials)
    return not waiting_trials(trials, files) and not any(files.missing_evaluations(trial.key) for trial in trials)


def run_jobs(
    trials: Sequence[TrialJob], files: StudyFiles, backend: Backend, scheduler: Scheduler,
    watchers: Sequence[Watcher] = (), *, stop_requested: Callable[[], bool] = lambda: False,
    promised: Mapping[str, Resources] | None = None,
) -> Summary:  # fmt: skip
    """Run all that is missing of `trials`.

    Args:
        scheduler: holds those that wait.
        promised: the nodes of a cluster that may yet grow; default: those that are there.

    Raises UserError with its message when a job fails by a mistake of the user's, or can never fit the cluster; other
    trials save and end first.
    """
    check_fits(waiting_trials(trials, files), {**backend.nodes(), **(promised or {})})
    loop = _Loop(files, backend, scheduler, watchers)
    try:
        return loop.run([trial.key for trial in trials], stop_requested)
    except Exception:  # whatever it is, what runs is to save
        backend.stop()
        raise


class _Loop:
    def __init__(
        self, files: StudyFiles, backend: Backend, scheduler: Scheduler, watchers: Sequence[Watcher]
    ) -> None:  # fmt: skip
        self.files, self.backend, self.scheduler, self.watchers = files, backend, scheduler, watchers
        self.nodes: Mapping[str, Resources] = {}
        self.names: dict[str, str] = {}
        self.unseen: dict[str, float] = {}  # finished trials whose files do not all show yet, and until when to wait

    def run(self, names: Iterable[str], stop_requested: Callable[[], bool]) -> Summary:
        look_at = list(names)  # whose exports may call for evaluations: at first everybody's
        while True:
            has_seen_all = self.has_seen_all()  # before: what shows only now is looked at in the next turn
            for name in look_at:
                self.scheduler.add_evaluations(self.files.missing_evaluations(name))
            if self.scheduler.finished and has_seen_all:
                return self.summary(stopped=False)
            self.look_at_nodes()
            for placement in self.scheduler.choose(self.nodes, self.backend.now()):
                self.backend.start(placement)
                for watcher in self.watchers:
                    watcher.started(placement)
            if self.backend.grows:
                self.backend.want(self.scheduler.demand())
            outcomes = self.backend.wait(_POLL_SECONDS)
            running = self.scheduler.running_trials
            look_at = [*self.files.exported(running), *self.unseen]
            for outcome in outcomes:
                self.end(outcome)
                if isinstance(outcome.job, TrialJob):
                    look_at.append(outcome.job.key)
            self.stop_the_diverging(running)
            changes = self.files.changes()
            self.apply(changes)
            for watcher in self.watchers:
                watcher.tick(self.scheduler, self.nodes)
            if changes.stop or stop_requested():
                self.backend.stop()
                return self.summary(stopped=True)

    def has_seen_all(self) -> bool:
        """Does the storage show all that finished trials have written, or has it had its time?"""
        now = self.backend.now()
        for trial, until in list(self.unseen.items()):
            if now > until or self.files.shows_all(trial):
                del self.unseen[trial]
        return not self.unseen

    def summary(self, *, stopped: bool) -> Summary:
        return Summary(stopped, self.scheduler.num_done, self.scheduler.failures, self.scheduler.retries)

    def look_at_nodes(self) -> None:
        """Note which nodes there are, and say which have come or gone."""
        before, self.nodes = self.nodes, self.backend.nodes()
        if before.keys() == self.nodes.keys():
            return
        self.names |= {node: self.backend.name(node) for node in self.nodes.keys() - before.keys()}
        joined = sorted(self.names[node] for node in self.nodes.keys() - before.keys())
        lost = sorted(self.names[node] for node in before.keys() - self.nodes.keys())
        for watcher in self.watchers:
            watcher.nodes(joined, lost)

    def end(self, outcome: Outcome) -> None:
        """Take note of how a job ended, and of what becomes of it."""
        job = outcome.job
        if outcome.status != "done" and self.files.proved(job):
            outcome = replace(outcome, status="done", message="")  # it was lost on its way home
        if outcome.status == "user_error":
            raise UserError(f"{job.key}: {outcome.message}")
        verdict = self.judge(outcome)
        wanted = self.files.job(job.key) if isinstance(job, TrialJob) else None
        if isinstance(job, TrialJob) and wanted is not None and verdict is None:
            self.unseen[job.key] = self.backend.now() + _STORAGE_SECONDS
            if wanted.images > job.images:
                self.scheduler.add_trials([wanted])  # its budget was raised meanwhile
        for watcher in self.watchers:
            watcher.ended(outcome, verdict)

    def judge(self, outcome: Outcome) -> Retry | Failure | None:
        """What becomes of a job that has ended."""
        job, now = outcome.job, self.backend.now()
        if isinstance(job, EvalJob):
            return self.scheduler.ended(outcome, now)
        remedy = self.files.shrink_micro_batch(job.key) if outcome.status == "out_of_memory" else None
        progress, again = self.files.progress(job.key), self.files.job(job.key)
        verdict = self.scheduler.ended(outcome, now, progress=progress, remedy=remedy, again=again)
        if isinstance(verdict, Failure) and verdict.state == "diverged":
            self.files.end_trial(job.key, "diverged", verdict.message)
        return verdict

    def stop_the_diverging(self, running: Iterable[str]) -> None:
        for trial, why in self.files.diverging(running).items():
            self.files.end_trial(trial, "diverged", why)
            self.drop(trial, why)
            self.tell(f"stopping {trial}: {why}")

    def apply(self, changes: Changes) -> None:
        """Do what was asked for."""
        for text in changes.told:
            self.tell(text)
        for trial, why in changes.dropped.items():
            self.drop(trial, why)
        self.scheduler.add_trials(waiting_trials(changes.added, self.files))
        for job in changes.added:
            self.scheduler.replace_evaluations(job.key, self.files.missing_evaluations(job.key))

    def drop(self, trial: str, why: str) -> None:
        if self.scheduler.drop(trial, why):
            self.backend.stop_job(trial)

    def tell(self, text: str) -> None:
        for watcher in self.watchers:
            watcher.told(text)


def check_fits(jobs: Iterable[Job], nodes: Mapping[str, Resources]) -> None:
    """Raises UserError for a job that would wait for ever."""
    big = first_that_never_fits(jobs, nodes)
    if big is None:
        return
    kind, keys = ("evaluation", "resources.eval_cpus, .eval_gpus") if isinstance(big, EvalJob) else (
        "trial", "resources.cpus, .gpus, .num_processes, .num_nodes")  # fmt: skip
    largest = max(nodes.values(), key=lambda node: (node.gpus, node.cpus), default=Resources())
    raise UserError(
        f"{kind} {big.key} needs {big.shapes[0]}, but the largest of {len(nodes)} nodes has {largest}; ask for less "
        f"({keys}) or give more or larger nodes."
    )
