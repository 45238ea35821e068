"""Plans: what the shipped studies would cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.jobs import Resources
from cluster.plan import duration, makespan, plan_text, size, trial_memory
from cluster.spec import load_study
from cluster.trials import make_trials
from trainer.memory import memory_of

STUDIES = Path(__file__).resolve().parents[2] / "configs" / "studies"


def test_imagenet64_is_the_papers_study() -> None:
    study = load_study(STUDIES / "imagenet64.yaml")
    trials = make_trials(study)
    assert [t.cost.num_params for t in trials] == [30_303_494, 68_126_598, 121_063_942, 272_281_350]
    assert [t.config.train.lr for t in trials] == pytest.approx([1.414e-4, 1.155e-4, 1e-4, 8.165e-5], rel=1e-3)
    assert all(t.total_images == 1_500_000 * 128 for t in trials)
    text = plan_text(study, trials)
    assert "1.858e20 FLOP in all" in text
    assert "174 H100-hours at 30 % of 989 TFLOP/s" in text


def test_imagenet256_has_the_two_stage_route() -> None:
    trials = {t.label: t for t in make_trials(load_study(STUDIES / "imagenet256.yaml"))}
    assert trials["two-stage-base64"].cost.num_params == 273_049_350
    assert trials["two-stage-upsampler"].cost.num_params == 279_792_390
    assert all(t.config.model.num_classes == 1000 for t in trials.values())
    assert trials["C=128"].config.model.channel_mult == (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_study_can_be_planned(path: Path) -> None:
    study = load_study(path)
    trials = make_trials(study)
    text = plan_text(study, trials)
    assert all(trial.name in text for trial in trials)


def test_the_cpu_study_gives_equal_compute_to_four_sizes() -> None:
    trials = make_trials(load_study(STUDIES / "cifar10_cpu.yaml"))
    assert len(trials) == 4
    computes = [t.compute for t in trials]
    assert max(computes) / min(computes) < 1.01


def test_more_devices_shorten_the_simulated_wall_time() -> None:
    study = load_study(STUDIES / "cifar10_cpu.yaml")
    trials = make_trials(study)
    one, two = (makespan(study, trials, Resources(cpus=n)) for n in (1, 2))
    assert 0.45 * one < two < 0.75 * one


def test_memory_of_each_process_is_shown_as_it_will_run() -> None:
    study = load_study(STUDIES / "cifar10_cpu.yaml")
    trials = make_trials(study)
    memories = [trial_memory(study, trial) for trial in trials]
    assert [m.total for m in memories] == sorted(m.total for m in memories)  # larger networks need more
    header, _, *rows = plan_text(study, trials).splitlines()[2 : 4 + len(trials)]
    assert "memory" in header
    for trial, memory, row in zip(trials, memories, rows, strict=True):
        assert memory == memory_of(trial.config, study.resources.num_processes, device="cpu")
        assert size(memory.total) in row


def test_words_for_times_and_sizes() -> None:
    assert [duration(s) for s in (5, 125, 7265, 400_000)] == ["0:05", "2:05", "2:01:05", "4.6 days"]
    assert [size(n) for n in (12, 3.5e6, 2e13)] == ["12 B", "3.5 MB", "20 TB"]
