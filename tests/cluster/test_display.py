"""The display of a study: what it says must never end it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.definition.spec import load_study
from cluster.definition.trials import make_trials
from cluster.files.folder import StudyFolder
from cluster.scheduling.driver import run_jobs
from cluster.scheduling.jobs import Changes, Resources, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.simulate import SimulatedCluster, SimulatedTrial
from cluster.watching.display import Display
from cluster.watching.names import NodeNames

STUDY = """
name: shown
run: {run}
ladder: {{key: model.channels, values: [4, 8]}}
settings: {{model.num_heads: 2}}
budget: {{images: 64}}
evaluation: {{test: {test}, num_points: 1, min_images: 64}}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Path, generated_data: Path) -> StudyFolder:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(run=tiny_config, test=generated_data / "test"))
    study = load_study(path)
    made = StudyFolder(tmp_path / "out", study, make_trials(study))
    made.prepare()
    return made


def world_of(folder: StudyFolder) -> tuple[SimulatedCluster, list[TrialJob]]:
    jobs = [folder.wanted(name) for name in folder.trials]
    trials = {job.key: SimulatedTrial(job, ()) for job in jobs}
    return SimulatedCluster({"n": Resources(cpus=2)}, trials), jobs


def drive(folder: StudyFolder, world: SimulatedCluster, jobs: list[TrialJob]) -> None:
    display = Display(folder, NodeNames(world))
    display._next = float("-inf")
    run_jobs(jobs, world, world, Scheduler(jobs), [display])


def test_a_trial_taken_out_of_the_study_while_it_runs_is_still_shown(
    folder: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    world, jobs = world_of(folder)
    name = "channels8-seed0"

    def changes() -> Changes:
        if name not in folder.trials or name in world.done:
            return Changes()
        del folder.trials[name]
        del world.trials[name]
        return Changes(dropped={name: "no longer in the study file"})

    world.changes = changes  # type: ignore[method-assign]
    drive(folder, world, jobs)
    assert "channels4-seed0" in world.done


def test_a_full_disk_under_the_output_ends_nothing(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return lambda *args: False

    world, jobs = world_of(folder)
    monkeypatch.setattr(sys, "stdout", Full())
    drive(folder, world, jobs)
    assert {"channels4-seed0", "channels8-seed0"} <= world.done
