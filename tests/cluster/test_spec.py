"""The study file: what is accepted, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.spec import load_study, nest
from cluster.trials import Trial, log_spaced, make_trials
from data_pipeline.errors import ConfigError

STUDY = """
name: small
run: tiny.yaml
ladder:
  key: model.channels
  values: [4, 8]
  label: "C={{value}}"
  rules: {{train.lr: {{value: 1.0e-3, at: 8, power: -0.5}}}}
settings: {{model.num_heads: 2}}
budget: {budget}
evaluation: {{test: data/test, num_points: 3, min_images: 16}}
"""


@pytest.fixture
def study_file(tmp_path: Path, tiny_config: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(tiny_config.read_text())
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(budget="{images: 100}"))
    return path


def trials(path: Path, *overrides: str) -> list[Trial]:
    return make_trials(load_study(path, overrides))


def test_a_trial_is_the_base_run_with_its_rung(study_file: Path) -> None:
    small, large = trials(study_file)
    assert (small.name, small.label, small.seed) == ("channels4-seed0", "C=4", 0)
    assert (small.config.model.channels, large.config.model.channels) == (4, 8)
    assert small.config.train.lr == pytest.approx(1e-3 * 2**0.5)
    assert large.config.train.lr == pytest.approx(1e-3)
    assert small.config.train.global_batch == 8  # the base's
    assert small.config.tracking.tags["size"] == "C=4"
    assert not small.config.tracking.mlflow  # the study's own child sends it


def test_budgets_are_moved_to_the_end_of_a_step_and_points_are_multiples_of_it(study_file: Path) -> None:
    small, _ = trials(study_file)
    assert small.total_images == 104  # 100 images are 12.5 steps of 8
    assert small.export_images == (16, 40, 104)
    assert small.config.train.budget_images == 104
    assert small.config.train.export_images == small.export_images


def test_equal_compute_means_more_images_for_the_smaller(study_file: Path) -> None:
    small, large = trials(study_file, "budget.flops=1e10")
    assert small.total_images > 1.5 * large.total_images
    for trial in (small, large):
        one_step = 8 * trial.cost.train_flops
        assert abs(trial.compute - 1e10) < one_step


def test_seeds_make_trials_of_their_own(study_file: Path) -> None:
    made = trials(study_file, "seeds=[0,1,2]")
    assert [(t.config.model.channels, t.seed) for t in made] == [(c, s) for c in (4, 8) for s in (0, 1, 2)]
    assert len({t.name for t in made}) == 6
    assert len({t.config.name for t in made}) == 6


def test_extra_trials_are_trained_but_not_fitted(study_file: Path) -> None:
    study_file.write_text(study_file.read_text() + "extra: [{name: stage2, run: tiny.yaml, budget_images: 24}]\n")
    *_, extra = trials(study_file)
    assert (extra.name, extra.fitted, extra.total_images) == ("stage2-seed0", False, 24)


def test_studies_inherit(study_file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: study.yaml\nname: child\nbudget: {images: 48}\n")
    study = load_study(child)
    assert (study.name, study.budget.images, study.ladder.values) == ("child", 48, (4, 8))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ladder.valuez=[1]", ["ladder.valuez=[1]", "did you mean 'values'"]),
        ("seeds=[1,1]", ["seeds=[1, 1]", "twice"]),
        ("ladder.values=[8,8]", ["ladder.values=[8, 8]", "twice"]),
        ("ladder.label='C={size}'", ["ladder.label='C={size}'", "{key}"]),
        ("run=nowhere.yaml", ["run=nowhere.yaml", "no such file"]),
        ("resources.gpus=4", ["resources.gpus=4", "resources.num_processes=1"]),
        ("evaluation.num_points=0", ["evaluation.num_points=0"]),
        ("name=a/b", ["name='a/b'"]),
        ("budget.images=0", ["budget.images=0"]),
    ],
)
def test_mistakes_are_named_with_path_and_value(study_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(study_file, [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("budget", ["{}", "{images: 10, flops: 1.0e9}"])
def test_exactly_one_budget(study_file: Path, budget: str) -> None:
    study_file.write_text(STUDY.format(budget=budget))
    with pytest.raises(ConfigError, match=r"exactly one of budget\.flops"):
        load_study(study_file)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ladder.values=[5]", ["channels5", "model.channels=5"]),
        ("ladder.key=model.chanels", ["chanels", "did you mean 'channels'"]),
        ("resources.num_processes=3", ["train.global_batch=8", "resources.num_processes=3"]),
    ],
)
def test_impossible_trials_are_named(study_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        trials(study_file, override)
    for word in words:
        assert word in str(caught.value)


def test_log_spacing() -> None:
    assert log_spaced(100, 10_000, 3, multiple=10) == (100, 1000, 10_000)
    assert log_spaced(512, 100, 5, multiple=4) == (100,)  # a budget below the first point
    close = log_spaced(8, 32, 50, multiple=8)
    assert close == (8, 16, 24, 32)  # points that coincide are one


def test_nest() -> None:
    assert nest({"a.b": 1, "a.c": 2, "d": {"e": 3}}) == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
