"""The study's loop: start what should run, note what ended, until nothing is left. Knows neither Ray nor files' layout.

All truth is in files, so the loop may die at any time: started again it finds what is done and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cluster.jobs import Backend, Job, Outcome, Resources, StudyFiles, TrialJob
from cluster.scheduler import Failure, Retry, Scheduler, first_that_never_fits
from data_pipeline.errors import UserError

_POLL_SECONDS = 0.5


@dataclass
class Watcher:
    """What the loop tells while it works; the display of a study."""

    started: Callable[[Job], None] = lambda job: None
    ended: Callable[[Outcome, Retry | Failure | None], None] = lambda outcome, verdict: None
    tick: Callable[[Scheduler], None] = lambda scheduler: None
    stop_requested: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Summary:
    """What a call of the driver did."""

    stopped: bool  # on request, before the end
    num_done: int
    failures: list[Failure] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)


def waiting_trials(trials: Iterable[TrialJob], files: StudyFiles) -> list[TrialJob]:
    """The trials that no result file proves complete."""
    return [trial for trial in trials if not files.trial_done(trial.key)]


def is_complete(trials: Iterable[TrialJob], files: StudyFiles) -> bool:
    """Is there nothing left to train or to evaluate?"""
    return all(files.trial_done(trial.key) and not files.missing_evaluations(trial.key) for trial in trials)


def run_jobs(
    trials: list[TrialJob], files: StudyFiles, backend: Backend, scheduler: Scheduler, watcher: Watcher
) -> Summary:
    """Run all that is missing. `scheduler` holds the waiting trials.

    Raises UserError with its message when a job fails by a mistake of the user's, or can never fit the cluster; other
    trials save and end first.
    """
    check_fits(trials, backend.largest())
    look_at = [trial.key for trial in trials]  # whose exports may call for evaluations: at first everybody's
    try:
        while True:
            for name in look_at:
                missing = files.missing_evaluations(name)
                check_fits(missing, backend.largest())
                scheduler.add_evaluations(missing)
            if scheduler.finished:
                return Summary(False, scheduler.num_done, scheduler.failures, scheduler.retries)
            for job in scheduler.choose(backend.total(), backend.now()):
                backend.start(job)
                watcher.started(job)
            look_at = [key for key, job in scheduler.running.items() if isinstance(job, TrialJob)]
            for outcome in backend.wait(_POLL_SECONDS):
                if outcome.status == "user_error":
                    raise UserError(f"{outcome.job.key}: {outcome.message}")
                watcher.ended(outcome, scheduler.ended(outcome, backend.now()))
            watcher.tick(scheduler)
            if watcher.stop_requested():
                backend.stop()
                return Summary(True, scheduler.num_done, scheduler.failures, scheduler.retries)
    except UserError:
        backend.stop()
        raise


def check_fits(jobs: Sequence[Job], largest: Resources) -> None:
    """Raises UserError for a job that would wait for ever."""
    big = first_that_never_fits(jobs, largest)
    if big is not None:
        kind, keys = ("trial", "resources.cpus, .gpus, .num_processes") if isinstance(big, TrialJob) else (
            "evaluation", "resources.eval_cpus, .eval_gpus")  # fmt: skip
        raise UserError(
            f"{kind} {big.key} needs {big.resources}, but the largest node has {largest}; ask for less ({keys}) or "
            "give larger nodes."
        )
