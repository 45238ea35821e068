"""From a study's folder to its report: run what is missing, fit, send to MLflow, say where to look."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial, data_folders
from cluster.files.edits import Edits
from cluster.files.folder import StudyFolder, requests
from cluster.heartbeat import heartbeat
from cluster.planning.fits import check_fits_devices, check_fits_storage
from cluster.scheduling.driver import Summary, Watcher, is_complete, run_jobs, waiting_trials
from cluster.scheduling.jobs import Resources, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.troubles import RetryPolicy
from cluster.watching.display import Display
from cluster.watching.journal import Journal
from cluster.watching.names import NodeNames
from cluster.watching.status import StatusFile
from cluster.watching.summary import write_summary
from data_pipeline.errors import INTERRUPTED_EXIT, UserError
from trainer.tracking.follow import SyncProcess

_FAILED_EXIT = 1


def run_study(folder: StudyFolder, edits: Edits, *, address: str | None, command: str) -> int:
    """Run what is missing, then report. Returns the exit code."""
    jobs = folder.prepare()
    summary = Summary(stopped=False, num_done=0)
    if is_complete(jobs, folder):
        print(f"study {folder.study.name}: all {len(jobs)} trials and their evaluations are done already", flush=True)
    else:
        _preflight(folder)
        summary = _run_missing(folder, edits, jobs, address)
    if summary.stopped:
        print(f"stopped; what was running is saved. To continue: {command}", flush=True)
        return INTERRUPTED_EXIT
    show_report(folder)
    failures = [failure for failure in summary.failures if failure.state == "failed"]
    for failure in failures:
        print(f"error: {failure.job.key} failed {failure.attempts} times: {failure.message}", file=sys.stderr)
    if failures:
        print(f"To try what failed again: {command}", file=sys.stderr)
    return _FAILED_EXIT if failures else 0


def show_report(folder: StudyFolder) -> None:
    """Write the laws and how the study went, send them to MLflow, and print them; the last lines say where to look.

    Raises UserError for a study of which nothing has been evaluated.
    """
    if not any(folder.current_records(name) for name in folder.trials):
        print(write_summary(folder), flush=True)
        raise UserError(f"{folder.path} holds no evaluation yet, so there is nothing to report; run the study first.")
    with heartbeat("fitting the laws"):
        from cluster.report import write_report
        from cluster.tracking import send_report

        report = write_report(folder)
        summary = write_summary(folder)
    print("\n".join(["", report.text, "", *([summary, ""] if summary else [])]), flush=True)
    with heartbeat("sending to MLflow"):
        lines = send_report(folder, report)
    if report.figure is not None:
        lines.insert(0, f"figure:        {os.path.relpath(report.figure)}")
    print("\n".join(lines), flush=True)


def promised_nodes(study: StudyConfig) -> Mapping[str, Resources]:
    """The nodes that an autoscaling cluster may grow to; none where it does not."""
    cluster = study.cluster
    if cluster is None or not cluster.autoscale:
        return {}
    return {f"promised {i}": Resources(cluster.cpus, cluster.gpus) for i in range(cluster.nodes)}


def _run_missing(folder: StudyFolder, edits: Edits, jobs: list[TrialJob], address: str | None) -> Summary:
    from cluster.launch.ray_backend import RayBackend
    from cluster.tracking import write_page

    study = folder.study
    waiting = waiting_trials(jobs, folder)
    retry = RetryPolicy(**study.retry.model_dump())
    scheduler = Scheduler(
        waiting, retry=retry, eval_share=study.resources.eval_share, shrink_seconds=study.resources.shrink_after
    )
    folder.look_for_changes = edits.look
    stop = _StopSignal()
    where = "on this machine" if address is None else f"at {address}"
    print(f"study {study.name}: {len(waiting)} of {len(jobs)} trials to train; starting Ray {where}", flush=True)
    with ExitStack() as stack:
        write_page(folder)
        if study.tracking.mlflow:
            experiment = study.tracking.experiment or study.name
            sync = SyncProcess(folder.path, uri=study.tracking.uri, experiment=experiment)
            stack.callback(sync.stop)
        if study.mirror is not None:
            from trainer.mirror import MirrorProcess

            stack.callback(MirrorProcess(folder.path, study.mirror).stop)
        grows = study.cluster is not None and study.cluster.autoscale
        allow_skew = study.cluster is not None and study.cluster.allow_skew
        with heartbeat("starting Ray"):
            backend = RayBackend(address, grows=grows, allow_skew=allow_skew)
        stop.listen()  # after Ray, which sets handlers of its own
        stack.callback(backend.close)
        seen: dict[str, Resources] = {}

        def fits(study: StudyConfig, trials: Sequence[Trial]) -> None:
            seen.update(backend.nodes())  # a node that is lost for now counts
            left = [trial for trial in trials if trial.name not in folder.trials or not folder.trial_done(trial.name)]
            evaluates = any(trial.evaluated for trial in trials)
            check_fits_devices(study, left, {**seen, **promised_nodes(study)}, evaluates=evaluates)

        fits(study, list(folder.trials.values()))
        edits.fits = fits
        names = NodeNames(backend)
        display = Display(folder, names)
        journal, status = Journal(folder.path, names), StatusFile(folder, names, address)
        stack.callback(display.end)
        stack.callback(status.end)
        watchers: list[Watcher] = [display, journal, status]
        note = stack.enter_context(journal.life(study.name, address))
        summary = run_jobs(
            jobs, folder, backend, scheduler, watchers,
            stop_requested=lambda: stop.requested, promised=promised_nodes(study),
        )  # fmt: skip
        note(summary)
        return summary


def _preflight(folder: StudyFolder) -> None:
    """Refuse now what would fail later: data that is not there, a feature net that is not known."""
    from data_pipeline.dataset import ShardDataset
    from evaluation.features import get_feature_net
    from trainer.guiding import check_guide
    from trainer.sampling import check_guidance

    trials = list(folder.trials.values())
    try:
        check_fits_storage(folder.study, trials, folder.path)
    except UserError as error:
        if not any(folder.progress(trial.name) for trial in trials):
            raise
        print(f"warning: {error} What finds no space will wait for it.", flush=True)  # it may be full for now only
    for path in data_folders(folder.study, trials):
        ShardDataset(path)
    for trial in trials:
        for request in requests(folder.study, trial, trial.total_images):
            request.check()
            request.check_data()
    distance = folder.study.evaluation.distance
    if distance is not None:
        for trial in trials:
            if trial.evaluated:
                check_guidance(trial.config, distance.guidance)
                check_guide(trial.config, distance)
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
