"""How a study used its cluster: device time by what it went into, and how near the schedule came to its bound.

Device time counts GPUs, or CPUs where a job has none. Of what finished trials and evaluations held,

    own work   is what trials trained, as their result files say, and evaluations from their first work on
    start-up   is the time from the decision to start a job to its first step
    repeated   is what trials and evaluations held beyond that where a start of theirs did not end well
    the rest   is what orchestration adds: noticing an end, ending processes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.files.folder import StudyFolder
from cluster.scheduling.jobs import EvalJob, Shape, TrialJob
from cluster.scheduling.simulate import SimulatedTrial, lower_bound, simulated_eval
from cluster.watching.history import WELL, History, Start


@dataclass(frozen=True)
class DeviceTime:
    """Device-seconds."""

    held: float = 0.0
    own: float = 0.0
    startup: float = 0.0
    repeated: float = 0.0

    @property
    def rest(self) -> float:
        return self.held - self.own - self.startup - self.repeated

    def __add__(self, other: DeviceTime) -> DeviceTime:
        return DeviceTime(
            self.held + other.held, self.own + other.own, self.startup + other.startup, self.repeated + other.repeated
        )


def device_time(folder: StudyFolder, history: History) -> DeviceTime:
    """Of all finished trials and evaluations."""
    return sum((_job_time(folder, starts) for starts in history.by_key.values()), DeviceTime())


def _job_time(folder: StudyFolder, starts: Sequence[Start]) -> DeviceTime:
    last = starts[-1]
    if last.status != "done":
        return DeviceTime()
    held = sum(start.seconds * start.held.devices for start in starts)
    startup = sum((start.startup or 0.0) * start.held.devices for start in starts)
    own = min(own_seconds(folder, last) * last.held.devices, held - startup)  # it may have begun before the journal
    disturbed = any(start.status not in WELL for start in starts)
    repeated = max(0.0, held - own - startup) if disturbed else 0.0
    return DeviceTime(held, own, startup, repeated)


def own_seconds(folder: StudyFolder, last: Start) -> float:
    """The own work of a job that is done, in the layout of its last start."""
    if last.kind == "trial":
        try:
            return float(json.loads((folder.run_folder(last.key) / "result.json").read_text())["seconds"])
        except (OSError, ValueError, KeyError):
            pass
    return last.seconds - (last.startup or 0.0)


def bound(folder: StudyFolder, history: History) -> float:
    """Seconds that no schedule of the jobs that are done goes below, had each been started once and worked as long.

    On the devices there were, in the mean over the time.
    """
    trials: dict[str, float] = {}
    shapes: dict[str, Shape] = {}
    evaluations: dict[tuple[str, int], list[EvalJob]] = {}
    for starts in history.by_key.values():
        last = starts[-1]
        if last.status != "done":
            continue
        seconds = own_seconds(folder, last) + (last.startup or 0.0)
        if last.kind == "trial":
            trials[last.key], shapes[last.key] = seconds, Shape(last.held)
        else:
            nimg = int(last.key.split("/")[1])
            job = simulated_eval(last.trial, nimg, shape=Shape(last.held), seconds=seconds)
            evaluations.setdefault((last.trial, nimg), []).append(job)
    return _lower_bound(folder, history, trials, shapes, evaluations)


def _lower_bound(
    folder: StudyFolder, history: History, trials: Mapping[str, float], shapes: Mapping[str, Shape],
    evaluations: Mapping[tuple[str, int], list[EvalJob]],
) -> float:  # fmt: skip
    points: dict[str, list[int]] = {name: [] for name in trials}
    for name, nimg in evaluations:
        points.setdefault(name, []).append(nimg)
    simulated = []
    for name, found in points.items():
        shape = shapes.get(name, Shape(history.capacity))  # one that was trained before there was a journal: no time
        job = TrialJob(name, folder.run_folder(name), (shape,), trials.get(name, 0.0))
        simulated.append(SimulatedTrial(job, tuple((1.0, nimg) for nimg in sorted(found))))
    return lower_bound(simulated, {"all": history.capacity}, lambda *point: evaluations.get(point, []))
