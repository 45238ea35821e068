"""From a study's folder to its report: run what is missing, fit, send to MLflow, say where to look."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack

from cluster.display import Display
from cluster.driver import Summary, is_complete, run_jobs, waiting_trials
from cluster.folder import StudyFolder, requests
from cluster.heartbeat import heartbeat
from cluster.jobs import TrialJob
from cluster.scheduler import Scheduler
from cluster.trials import data_folders
from data_pipeline.errors import INTERRUPTED_EXIT, UserError
from trainer.tracking.follow import SyncProcess

_FAILED_EXIT = 1


def run_study(folder: StudyFolder, *, address: str | None, command: str) -> int:
    """Run what is missing, then report. Returns the exit code."""
    jobs = folder.prepare()
    summary = Summary(stopped=False, num_done=0)
    if is_complete(jobs, folder):
        print(f"study {folder.study.name}: all {len(jobs)} trials and their evaluations are done already", flush=True)
    else:
        _preflight(folder)
        summary = _run_missing(folder, jobs, address)
    if summary.stopped:
        print(f"stopped; what was running is saved. To continue: {command}", flush=True)
        return INTERRUPTED_EXIT
    show_report(folder)
    for failure in summary.failures:
        print(f"error: {failure.job.key} failed {failure.attempts} times: {failure.message}", file=sys.stderr)
    if summary.failures:
        print(f"To try what failed again: {command}", file=sys.stderr)
    return _FAILED_EXIT if summary.failures else 0


def show_report(folder: StudyFolder) -> None:
    """Write the laws, send them to MLflow, and print them; the last lines say where to look.

    Raises UserError for a study of which nothing has been evaluated.
    """
    if not any(folder.current_records(name) for name in folder.trials):
        raise UserError(f"{folder.path} holds no evaluation yet, so there is nothing to report; run the study first.")
    with heartbeat("fitting the laws"):
        from cluster.report import write_report
        from cluster.tracking import send_report

        report = write_report(folder)
    print(f"\n{report.text}\n", flush=True)
    with heartbeat("sending to MLflow"):
        lines = send_report(folder, report)
    if report.figure is not None:
        lines.insert(0, f"figure:        {os.path.relpath(report.figure)}")
    print("\n".join(lines), flush=True)


def _run_missing(folder: StudyFolder, jobs: list[TrialJob], address: str | None) -> Summary:
    from cluster.launch import RayBackend
    from cluster.tracking import write_page

    study = folder.study
    waiting = waiting_trials(jobs, folder)
    scheduler = Scheduler(waiting, attempts=study.retry.attempts, first_pause=study.retry.first_pause)
    display = Display(folder)
    stop = _StopSignal()
    display.stop_requested = lambda: stop.requested
    where = "on this machine" if address is None else f"at {address}"
    print(f"study {study.name}: {len(waiting)} of {len(jobs)} trials to train; starting Ray {where}", flush=True)
    with ExitStack() as stack:
        write_page(folder)
        if study.tracking.mlflow:
            experiment = study.tracking.experiment or study.name
            sync = SyncProcess(folder.path, uri=study.tracking.uri, experiment=experiment)
            stack.callback(sync.stop)
        with heartbeat("starting Ray"):
            backend = RayBackend(address)
        stop.listen()  # after Ray, which sets handlers of its own
        stack.callback(backend.close)
        stack.callback(display.end)
        return run_jobs(jobs, folder, backend, scheduler, display)


def _preflight(folder: StudyFolder) -> None:
    """Refuse now what would fail later: data that is not there, a feature net that is not known."""
    from data_pipeline.dataset import ShardDataset
    from evaluation.features import get_feature_net

    for path in data_folders(folder.study, list(folder.trials.values())):
        ShardDataset(path)
    for trial in folder.trials.values():
        for request in requests(folder.study, trial, trial.total_images):
            request.check()
            request.check_data()
    distance = folder.study.evaluation.distance
    if distance is not None:
        get_feature_net(distance.feature_net, weights=distance.feature_weights)


class _StopSignal:
    """SIGTERM and the first Ctrl-C ask for a clean stop; the second Ctrl-C means now."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping: the running trials save first (Ctrl-C again ends at once)", flush=True)
