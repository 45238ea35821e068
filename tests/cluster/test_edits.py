"""What is asked of a study that runs: by its file, by an update from elsewhere, by marks in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.definition.portable import save_portable
from cluster.definition.spec import EarlyStop, StudyConfig, load_study
from cluster.definition.trials import Trial, make_trials
from cluster.files.divergence import ErrorWatch
from cluster.files.edits import NEXT, Edits
from cluster.files.folder import MICRO_BATCH, StudyFolder
from cluster.files.verdicts import ask_to_stop, read_verdict, remove_verdict, write_verdict
from cluster.scheduling.jobs import Changes
from data_pipeline.errors import ConfigError
from data_pipeline.files import mark_of
from trainer.config.run import load_config
from trainer.tracking.records import TrainRecord

STUDY = """
name: edited
run: {run}
ladder: {{key: model.channels, values: [4, 8]}}
settings: {{model.num_heads: 2}}
seeds: [0]
budget: {{images: 64}}
evaluation: {{test: {test}, num_points: 1, min_images: 64}}
"""


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[StudyConfig, list[Trial]]:
    study = load_study(path, overrides)
    return study, make_trials(study)


@pytest.fixture
def study_file(tmp_path: Path, tiny_config: Path, generated_data: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(run=tiny_config, test=generated_data / "test"))
    return path


@pytest.fixture
def folder(study_file: Path, tmp_path: Path) -> StudyFolder:
    made = StudyFolder(tmp_path / "out", *load(study_file))
    made.prepare()
    return made


def look(edits: Edits) -> Changes:
    edits._look_at = edits._verdicts_at = 0.0  # do not wait two seconds
    return edits.look()


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_sizes_and_seeds_are_added_by_editing_the_file(study_file: Path, folder: StudyFolder) -> None:
    edits = Edits(folder, study_file, load)
    assert look(edits) == Changes()
    rewrite(study_file, "[4, 8]", "[4, 8, 12]")
    rewrite(study_file, "seeds: [0]", "seeds: [0, 1]")
    changes = look(edits)
    new = {"channels12-seed0", "channels12-seed1", "channels4-seed1", "channels8-seed1"}
    assert new <= {job.key for job in changes.added}
    assert changes.dropped == {}
    assert "study.yaml has changed" in changes.told[0]
    assert set(folder.trials) == new | {"channels4-seed0", "channels8-seed0"}
    assert load_config(folder.run_folder("channels12-seed1") / "trial.yaml").seed == 1
    assert look(edits) == Changes()


def test_a_size_taken_out_of_the_file_is_dropped(study_file: Path, folder: StudyFolder) -> None:
    edits = Edits(folder, study_file, load)
    rewrite(study_file, "[4, 8]", "[4]")
    assert look(edits).dropped == {"channels8-seed0": "no longer in the study file"}
    assert list(folder.trials) == ["channels4-seed0"]


def test_priorities_change_while_it_runs(study_file: Path, folder: StudyFolder) -> None:
    edits = Edits(folder, study_file, load)
    study_file.write_text(study_file.read_text() + "priorities: {'channels8-*': 7}\n")
    assert [(job.key, job.priority) for job in look(edits).added] == [("channels8-seed0", 7)]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[4, 8]", "[4, 8", "study.yaml"),  # half a file, as an editor may leave it for a moment
        ("num_heads: 2", "num_heads: 3", "num_heads"),
        ("name: edited", "name: other", "keeps its name"),
        ("budget: {images: 64}", "budget: {imagse: 64}", "imagse"),
    ],
)
def test_a_file_that_is_wrong_changes_nothing(
    study_file: Path, folder: StudyFolder, old: str, new: str, says: str
) -> None:
    edits, before = Edits(folder, study_file, load), dict(folder.trials)
    rewrite(study_file, old, new)
    changes = look(edits)
    assert (changes.added, changes.dropped) == ((), {})
    assert "not taken over" in changes.told[0]
    assert says in changes.told[0]
    assert folder.trials == before
    rewrite(study_file, new, old)
    assert "no trial differs" in look(edits).told[0]


def test_what_the_cluster_cannot_hold_changes_nothing(study_file: Path, folder: StudyFolder) -> None:
    edits, before = Edits(folder, study_file, load), (folder.path / "study.yaml").read_text()

    def refuse(study: StudyConfig, trials: list[Trial]) -> None:
        raise ConfigError(f"resources.cpus={study.resources.cpus:g}: no node has so many")

    edits.fits = refuse
    study_file.write_text(study_file.read_text() + "resources: {cpus: 64}\n")
    assert "resources.cpus=64: no node has so many" in look(edits).told[0]
    assert (folder.path / "study.yaml").read_text() == before


def test_whatever_goes_wrong_with_an_edit_the_study_goes_on(study_file: Path, folder: StudyFolder) -> None:
    def broken(path: Path) -> tuple[StudyConfig, list[Trial]]:
        raise OSError(28, "No space left on device")

    edits = Edits(folder, study_file, broken)
    rewrite(study_file, "[4, 8]", "[4, 8, 12]")
    assert "No space left on device" in look(edits).told[0]


def test_other_evaluations_are_wanted_of_all_trials(study_file: Path, folder: StudyFolder) -> None:
    edits = Edits(folder, study_file, load)
    rewrite(study_file, "min_images: 64", "min_images: 64, nll: {num_calls: 256}")
    assert {job.key for job in look(edits).added} == set(folder.trials)


def test_what_an_earlier_driver_was_asked_is_not_asked_of_the_next(study_file: Path, folder: StudyFolder) -> None:
    ask_to_stop(folder.path)
    save_portable(load(study_file, ["seeds=[0, 5]"])[0], folder.path, NEXT)
    edits = Edits(folder, study_file, load)
    assert look(edits) == Changes()
    assert not list(folder.path.glob(f"{NEXT}*"))


def test_an_edit_made_while_the_study_is_read_is_not_lost(study_file: Path, folder: StudyFolder) -> None:
    read_at = mark_of(study_file)
    rewrite(study_file, "[4, 8]", "[4, 8, 12]")
    edits = Edits(folder, study_file, load, read_at=read_at)
    assert "channels12-seed0" in {job.key for job in look(edits).added}


def test_a_trial_that_would_be_another_run_is_refused(study_file: Path, folder: StudyFolder) -> None:
    from trainer.run_folder import RunFolder

    for name in folder.trials:
        run = folder.run_folder(name)
        RunFolder(run).open(load_config(run / "trial.yaml"), {})  # as the trainer does
    edits, before = Edits(folder, study_file, load), (folder.run_folder("channels4-seed0") / "trial.yaml").read_text()
    rewrite(study_file, "model.num_heads: 2", "model.num_heads: 2, train.lr: 0.5")
    assert "train.lr: 0.001 -> 0.5" in look(edits).told[0]
    assert (folder.run_folder("channels4-seed0") / "trial.yaml").read_text() == before


def test_an_update_comes_from_elsewhere(study_file: Path, folder: StudyFolder) -> None:
    edits = Edits(folder, study_file, load)
    study, _ = load(study_file, ["seeds=[0, 5]"])
    save_portable(study, folder.path, NEXT)
    assert {job.key for job in look(edits).added} >= {"channels4-seed5", "channels8-seed5"}
    assert not list(folder.path.glob(f"{NEXT}*"))


def test_the_studys_own_copy_needs_nothing_else(folder: StudyFolder, study_file: Path, tmp_path: Path) -> None:
    study_file.unlink()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in folder.path.glob("study*.yaml"):
        (moved / path.name).write_text(path.read_text())
    again, trials = load(moved / "study.yaml")
    assert again.seeds == folder.study.seeds
    assert {trial.name: trial.config for trial in trials} == {n: t.config for n, t in folder.trials.items()}


def test_a_trial_is_cancelled_and_given_another_chance(study_file: Path, folder: StudyFolder) -> None:
    edits, run = Edits(folder, study_file, load), folder.run_folder("channels4-seed0")
    write_verdict(run, "cancelled", "by request", 24)
    assert look(edits).dropped == {"channels4-seed0": "by request"}
    assert look(edits) == Changes()
    assert folder.verdict("channels4-seed0") == "by request"
    assert remove_verdict(run)
    assert [job.key for job in look(edits).added] == ["channels4-seed0"]
    assert folder.verdict("channels4-seed0") is None
    assert not remove_verdict(run)


def test_the_first_verdict_stands(tmp_path: Path) -> None:
    write_verdict(tmp_path, "diverged", "its loss", 10)
    assert write_verdict(tmp_path, "cancelled", "by request", 20).state == "diverged"
    (tmp_path / "verdict.json").write_text("{")
    assert read_verdict(tmp_path) is None  # torn by hand: no reason to end anything


def test_asking_to_stop_is_answered_once(study_file: Path, folder: StudyFolder) -> None:
    edits = Edits(folder, study_file, load)
    ask_to_stop(folder.path)
    assert look(edits).stop
    assert not look(edits).stop


def test_the_micro_batch_is_reduced_once_and_stays_so(folder: StudyFolder) -> None:
    name = "channels4-seed0"
    run = folder.run_folder(name)
    said = folder.shrink_micro_batch(name)
    assert said == "micro-batch 4 instead of 8, the global batch stays 8"
    assert load_config(run / "trial.yaml").train.micro_batch == 4
    assert folder.shrink_micro_batch(name) is None
    folder.prepare()  # another driver
    assert load_config(run / "trial.yaml").train.micro_batch == 4
    assert load_config(folder.run_folder("channels8-seed0") / "trial.yaml").train.micro_batch is None
    (run / MICRO_BATCH).write_text("{torn")
    folder.prepare()
    assert load_config(run / "trial.yaml").train.micro_batch is None


def test_a_folder_of_another_run_is_refused_before_anything_is_written(
    study_file: Path, folder: StudyFolder, tmp_path: Path
) -> None:
    from trainer.run_folder import RunFolder

    run = folder.run_folder("channels8-seed0")
    RunFolder(run).open(load_config(run / "trial.yaml"), {})
    other = StudyFolder(folder.path, *load(study_file, ["settings.train.lr=0.5"]))
    before = (folder.run_folder("channels4-seed0") / "trial.yaml").read_text()
    with pytest.raises(ConfigError, match=r"train\.lr"):
        other.prepare()
    assert (folder.run_folder("channels4-seed0") / "trial.yaml").read_text() == before


# ---- divergence ----------------------------------------------------------------------------------------------------


def write_errors(run: Path, losses: Sequence[float], first: int = 1) -> None:
    with open(run / "metrics.0.jsonl", "a", encoding="utf-8") as file:
        for i, loss in enumerate(losses):
            record = TrainRecord(nimg=8 * (first + i), compute=1.0, time=0.0, values={"train/mse": loss})
            file.write(json.dumps(record.__dict__) + "\n")


def test_an_error_that_has_left_its_own_level_is_noticed(tmp_path: Path) -> None:
    watch = ErrorWatch(EarlyStop(loss_factor=4.0, window=3))
    write_errors(tmp_path, [1.0, 0.5, 0.2, 0.1, 0.1])
    assert watch.look(tmp_path) is None
    write_errors(tmp_path, [9.0, 0.1, 0.1], first=6)  # a spike is none
    assert watch.look(tmp_path) is None
    write_errors(tmp_path, [0.9, 0.8, 0.9], first=9)
    said = watch.look(tmp_path)
    assert said is not None
    assert "diverged at 88 images" in said
    assert "0.8 and more, is above early_stop.loss_factor=4 times the 0.1" in said
    assert watch.look(tmp_path) is None  # nothing new


def test_a_trial_with_another_chance_is_judged_anew(folder: StudyFolder) -> None:
    name = "channels4-seed0"
    run = folder.run_folder(name)
    write_errors(run, [0.1] * 12 + [5.0] * 12)
    assert name in folder.diverging([name])
    folder.end_trial(name, "diverged", "its error")
    assert remove_verdict(run)
    write_errors(run, [0.1] * 12, first=25)
    for again in (folder, StudyFolder(folder.path, folder.study, list(folder.trials.values()))):  # also a new driver
        again.forget_errors(name)
        again._look_at["errors"] = 0.0
        assert again.diverging([name]) == {}


def test_an_error_that_falls_and_wavers_is_left_alone(tmp_path: Path) -> None:
    import random

    draw = random.Random(0)
    watch = ErrorWatch(EarlyStop())
    # One record in five is six times too large, as those of small batches can be.
    spiky = [(1.0 / (1 + i) + 0.05) * (6 if draw.random() < 0.2 else draw.uniform(0.6, 1.5)) for i in range(1000)]
    write_errors(tmp_path, spiky)
    assert watch.look(tmp_path) is None
