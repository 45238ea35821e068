"""When a running study will be done: the real scheduler on a simulated clock, at the speeds measured so far."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.definition.shapes import eval_shape
from cluster.definition.trials import Trial
from cluster.files.folder import StudyFolder
from cluster.planning.costs import evaluation_seconds, trial_seconds
from cluster.scheduling.jobs import EvalJob, Resources
from cluster.scheduling.scheduler import first_that_never_fits
from cluster.scheduling.simulate import SimulatedTrial, lower_bound, simulated_eval, simulated_schedule
from cluster.watching.journal import Event
from data_pipeline.errors import UserError

_MOST_JOBS = 2000  # that are simulated; of more, only the time that no schedule can go below is given
_AT_ONCE = 1e-9  # the share of a trial's time at which exports come that are there already


@dataclass(frozen=True)
class Progress:
    """How far a trial is."""

    nimg: int
    speed: float  # images a second; 0: not known yet
    missing: Mapping[int, int]  # evaluations that its exports call for, by nimg


def seconds_left(
    folder: StudyFolder, progress: Mapping[str, Progress], nodes: Mapping[str, Resources], events: Iterable[Event]
) -> float | None:  # fmt: skip
    """Seconds until all trials in `progress` are trained and evaluated on `nodes`; None where they never will be."""
    trials = [_simulated(folder, name, done, pace=_training_pace(folder, progress)) for name, done in progress.items()]
    if not trials:
        return 0.0
    if not nodes or first_that_never_fits([trial.job for trial in trials], nodes) is not None:
        return None
    evaluations = _Evaluations(folder, progress, _evaluation_pace(events))
    if sum(1 + len(trial.exports) for trial in trials) > _MOST_JOBS:
        return lower_bound(trials, nodes, evaluations)
    try:
        share = folder.study.resources.eval_share
        return simulated_schedule(trials, nodes, evaluations, eval_share=share).makespan
    except UserError:  # its evaluations find no room
        return None


class _Evaluations:
    """What each export of a trial calls for."""

    def __init__(self, folder: StudyFolder, progress: Mapping[str, Progress], pace: float) -> None:
        self._folder, self._progress, self._pace = folder, progress, pace

    def __call__(self, name: str, nimg: int) -> list[EvalJob]:
        study, trial = self._folder.study, self._folder.trials[name]
        each = evaluation_seconds(study, trial, last=nimg == trial.total_images)
        if nimg in self._progress[name].missing:
            each = each[-self._progress[name].missing[nimg] :]
        jobs = [
            simulated_eval(name, nimg, shape=eval_shape(study), seconds=seconds * self._pace, priority=trial.priority)
            for seconds in each for _ in range(study.resources.eval_shards)
        ]  # fmt: skip
        return [dataclasses.replace(job, key=f"{job.key}/{i}") for i, job in enumerate(jobs)]


def _simulated(folder: StudyFolder, name: str, done: Progress, *, pace: float) -> SimulatedTrial:
    trial, job = folder.trials[name], folder.wanted(name)
    left = trial.total_images - done.nimg
    seconds = left / done.speed if done.speed else _seconds_an_image(folder, trial) * pace * left
    exports = [(_AT_ONCE, nimg) for nimg in sorted(done.missing)]
    exports += [((nimg - done.nimg) / left, nimg) for nimg in trial.export_images if nimg > done.nimg]
    return SimulatedTrial(dataclasses.replace(job, seconds=seconds), tuple(exports))


def _training_pace(folder: StudyFolder, progress: Mapping[str, Progress]) -> float:
    """Seconds that training takes for one that it was expected to take."""
    found = [
        1 / (done.speed * _seconds_an_image(folder, folder.trials[name]))
        for name, done in progress.items() if done.speed
    ]  # fmt: skip
    return statistics.median(found) if found else 1.0


def _evaluation_pace(events: Iterable[Event]) -> float:
    expected: dict[str, float] = {}
    paces = []
    for event in events:
        if event["event"] == "started" and event["kind"] == "evaluation":
            expected[event["key"]] = event["expected"]
        elif event["event"] == "ended" and event["status"] == "done" and expected.get(event["key"]):
            paces.append(event["seconds"] / expected[event["key"]])
    return statistics.median(paces) if paces else 1.0


def _seconds_an_image(folder: StudyFolder, trial: Trial) -> float:
    return trial_seconds(folder.study, trial) / trial.total_images
