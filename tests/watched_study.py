"""A small made study for tests of watching: its folder, its trials' files, and drivers on a simulated cluster."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.definition.spec import load_study
from cluster.definition.trials import make_trials
from cluster.files.folder import StudyFolder
from cluster.scheduling.driver import Summary, Watcher, run_jobs
from cluster.scheduling.jobs import EvalJob, Job, Resources, Shape, Status, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.simulate import NodeEvent, SimulatedCluster, SimulatedTrial, simulated_eval
from cluster.scheduling.troubles import RetryPolicy
from cluster.watching.journal import EVENTS, Event, Journal, read_events
from cluster.watching.names import NodeNames
from cluster.watching.status import StatusFile
from trainer.tracking.records import RecordWriter, TrainRecord

STUDY = """
name: watched
run: {run}
ladder: {{key: model.channels, values: [4, 8], label: "C={{value}}"}}
settings: {{model.num_heads: 2}}
budget: {{images: 64}}
evaluation: {{test: {test}, images: [32], nll: {{splits: [test], num_calls: 128}}}}
resources: {{cpus: 2}}
"""
SMALL, LARGE = "channels4-seed0", "channels8-seed0"
BEGAN = 1_700_000_000.0  # of the simulated clock


def make_folder(path: Path, run: Path, data: Path) -> StudyFolder:
    path.mkdir(parents=True, exist_ok=True)
    file = path / "given.yaml"
    file.write_text(STUDY.format(run=run, test=data / "test"))
    study = load_study(file)
    folder = StudyFolder(path / "out", study, make_trials(study))
    folder.prepare()
    return folder


def train(
    folder: StudyFolder, trial: str, nimg: int, *, done: bool = False, speed: float = 8.0, ahead: float = 0.0
) -> None:  # fmt: skip
    """Leave the files of a trial that has seen so many images, and saved half of them.

    `ahead`: seconds from now to its first step.
    """
    run = folder.run_folder(trial)
    writer = RecordWriter(run, 0)
    writer.write(TrainRecord(nimg, 1e6 * nimg, time.time(), {"speed/img_per_second": speed, "train/loss": 0.5}))
    writer.close()
    (run / "started.json").write_text(json.dumps({"time": time.time() + ahead, "nimg": 8, "pid": 1}))
    (run / "checkpoints" / f"{nimg // 2:012d}").mkdir(parents=True)
    if done:
        (run / "result.json").write_text(json.dumps({"status": "complete", "nimg": nimg, "seconds": 80.0}))


@dataclass
class Drive:
    """A driver with its journal and status file on a simulated cluster of two nodes of two CPUs."""

    folder: StudyFolder
    fate: dict[tuple[str, int], Status]
    events: tuple[NodeEvent, ...] = ()

    def __post_init__(self) -> None:
        shape = Shape(Resources(cpus=2), num_processes=2)
        jobs = [TrialJob(name, self.folder.run_folder(name), (shape,), 100.0) for name in self.folder.trials]
        trials = {job.key: SimulatedTrial(job, ((0.5, 32), (1.0, 64))) for job in jobs}
        nodes = dict.fromkeys(("n1", "n2"), Resources(cpus=2))
        self.world = SimulatedCluster(nodes, trials, _evaluations, self._ends, self.events)
        self.jobs = jobs

    def _ends(self, job: Job, attempt: int) -> Status:
        return self.fate.get((job.key, attempt), "done")

    def now(self) -> float:
        return BEGAN + self.world.clock

    def run(self, *watchers: Watcher) -> Summary:
        names = NodeNames(self.world)
        journal = Journal(self.folder.path, names, clock=self.now)
        status = StatusFile(self.folder, names, None, clock=self.now)
        with journal.life("watched", None) as note:
            scheduler = Scheduler(self.jobs, retry=RetryPolicy(attempts=2, first_pause=5))
            summary = run_jobs(self.jobs, self.world, self.world, scheduler, [journal, status, *watchers])
            note(summary)
        status.end()
        return summary

    @property
    def journal(self) -> list[Event]:
        return read_events(self.folder.path / EVENTS)


def _evaluations(trial: str, nimg: int) -> list[EvalJob]:
    return [simulated_eval(trial, nimg, shape=Shape(Resources(cpus=1)), seconds=3)]
