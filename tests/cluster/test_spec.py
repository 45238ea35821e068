"""The study file: what is accepted, what is refused and with which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.definition.ladder import Ladder, value_name
from cluster.definition.shapes import eval_shape, trial_shapes
from cluster.definition.spec import StudyConfig, load_study, nest
from cluster.definition.trials import Trial, log_spaced, make_trials
from cluster.files.folder import requests
from cluster.scheduling.jobs import Resources, Shape
from data_pipeline.errors import ConfigError
from trainer.config.tree import save_config, validate

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
        ("ladder.label=small", ["ladder.label='small'", "['small', 'small']", "of its own"]),
        ("resources.gpus=4", ["resources.gpus=4", "resources.num_processes=1"]),
        ("evaluation.num_points=0", ["evaluation.num_points=0"]),
        ("name=a/b", ["name='a/b'"]),
        ("budget.images=0", ["budget.images=0"]),
        ("ladder.key=seed", ["seed is set by the study itself", "use seeds"]),
        ("ladder.key=train.budget_images", ["train.budget_images", "use budget.images"]),
        ("settings.train.budget_images=9", ["settings: train.budget_images=9", "use budget.images"]),
        ("settings={train.export_images: [8]}", ["train.export_images=[8]", "use evaluation.images"]),
        ("ladder.key=train.lr", ["ladder.rules.train.lr", "own key"]),
        ("ladder.values=[a,b]", ["ladder.values=['a', 'b']", "train.lr", "positive number", "table"]),
        ("ladder.values=[8,-8]", ["ladder.values=[8, -8]", "positive number"]),
        ("ladder.values=[1,'1']", ["'1' twice"]),
        ("evaluation.distance={num_samples: 8, low_res_noise: 3}", ["evaluation.distance.low_res_noise=3", "enlarge"]),
        ("evaluation.images=[0]", ["evaluation.images=[0]", "before the first step"]),
        ("evaluation.flops=[-1.0]", ["evaluation.flops=[-1.0]", "before the first step"]),
        ("resources.num_nodes=2", ["resources.num_nodes=2", "resources.num_processes=1"]),
        ("resources.min_processes=3", ["resources.min_processes=3", "use one of [1]"]),
        ("retry.longest_pause=1", ["retry.longest_pause=1", "retry.first_pause=5"]),
        ("early_stop.loss_factor=1", ["early_stop.loss_factor=1"]),
        ("mirror=backup", ["mirror=backup", "s3://bucket/folder"]),
        ("mirror=s3://me:secret@host/bucket", ["a password", "environment"]),
        ("cluster={nodes: 2}", ["cluster.cpus: missing"]),
        ("device.memory_gb=0", ["device.memory_gb=0"]),
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
        ("priorities={'channels9*': 1}", ["priorities.channels9*", "channels4-seed0, channels8-seed0"]),
    ],
)
def test_impossible_trials_are_named(study_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        trials(study_file, override)
    for word in words:
        assert word in str(caught.value)


LADDER = """
name: any
run: tiny.yaml
ladder: {{key: {key}, values: {values}{more}}}
budget: {{images: 96}}
evaluation: {{test: data/test}}
"""


def ladder(path: Path, key: str, values: str, more: str = "", *overrides: str) -> list[Trial]:
    path.write_text(LADDER.format(key=key, values=values, more=f", {more}" if more else ""))
    return trials(path, *overrides)


@pytest.mark.parametrize(
    ("key", "values", "names", "labels"),
    [
        ("model.channel_mult", "[[1, 2], [1, 2, 2]]", ["channel_mult1-2", "channel_mult1-2-2"],
         ["channel_mult=1-2", "channel_mult=1-2-2"]),
        ("model.num_res_blocks", "[1, 2]", ["num_res_blocks1", "num_res_blocks2"],
         ["num_res_blocks=1", "num_res_blocks=2"]),
        ("diffusion.schedule", "[linear, cosine]", ["schedulelinear", "schedulecosine"],
         ["schedule=linear", "schedule=cosine"]),
        ("diffusion.rescale_timesteps", "[true, false]", ["rescale_timestepstrue", "rescale_timestepsfalse"],
         ["rescale_timesteps=true", "rescale_timesteps=false"]),
        ("train.lr", "[1.0e-3, 0.00005]", ["lr0.001", "lr5e-05"], ["lr=0.001", "lr=5e-05"]),
        ("diffusion.mse_target", "[null, v]", ["mse_targetnull", "mse_targetv"], ["mse_target=null", "mse_target=v"]),
    ],
)  # fmt: skip
def test_any_key_can_be_the_ladder(
    study_file: Path, key: str, values: str, names: list[str], labels: list[str]
) -> None:
    made = ladder(study_file, key, values)
    assert [trial.name for trial in made] == [f"{name}-seed0" for name in names]
    assert [trial.label for trial in made] == labels
    section, _, name = key.partition(".")
    found = [getattr(getattr(trial.config, section), name) for trial in made]
    assert found == [tuple(v) if isinstance(v, list) else v for v in load_study(study_file).ladder.values]
    assert len({trial.colour for trial in made}) == 2


def test_names_and_colours_of_numbers_are_what_they_always_were(study_file: Path) -> None:
    made = ladder(study_file, "model.channels", "[16, 4, 8, 12]")
    assert [trial.name for trial in made] == [f"channels{n}-seed0" for n in (16, 4, 8, 12)]
    assert [trial.config.tracking.tags["mlflow.runColor"] for trial in made] == [
        "#471365", "#86d549", "#20938c", "#2e6e8e"]  # fmt: skip


def test_a_rule_is_a_power_or_a_table_and_may_stay_an_integer(study_file: Path) -> None:
    rules = (
        "rules: {train.global_batch: {value: 8, at: 4, power: 0.6, round_to: 8},"
        " train.lr: {value: 1.0e-3, at: 4, power: -0.5},"
        " model.channel_mult: {values: [[1, 2], [1, 2], [1, 2, 2]]},"
        " diffusion.schedule: {values: [linear, linear, cosine]}}"
    )
    made = ladder(study_file, "model.channels", "[4, 8, 16]", rules)
    batches = [trial.config.train.global_batch for trial in made]
    assert batches == [8, 16, 16]  # 8, 12.1 and 18.4, to the nearest multiple of 8
    assert all(isinstance(batch, int) for batch in batches)
    assert [trial.config.train.lr for trial in made] == pytest.approx([1e-3, 1e-3 / 2**0.5, 5e-4])
    assert [trial.config.model.channel_mult for trial in made] == [(1, 2), (1, 2), (1, 2, 2)]
    assert [trial.config.diffusion.schedule for trial in made] == ["linear", "linear", "cosine"]
    assert all(trial.total_images % trial.config.train.global_batch == 0 for trial in made)


def test_a_rule_can_be_changed_on_the_command_line(study_file: Path) -> None:
    assert [trial.config.train.lr for trial in trials(study_file, "ladder.rules.train.lr=null")] == [0.001, 0.001]
    small, _ = trials(study_file, "ladder.rules.train.lr.power=-1", "ladder.rules.train.warmup_images.values=[0,80]")
    assert small.config.train.lr == pytest.approx(2e-3)
    assert small.config.train.warmup_images == 0


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{value: 1.0, at: 4}", ["ladder.rules.train.lr.power: missing", "{values: [...]}"]),
        ("{values: [1.0]}", ["ladder.rules.train.lr: 1 values=[1.0] for 2 ladder.values=[4, 8]"]),
        ("{values: [1.0, 2.0], at: 4}", ["ladder.rules.train.lr", "is a table"]),
        ("{value: 1.0, at: 0, power: 1}", ["ladder.rules.train.lr.at=0"]),
        ("{value: 1.0, at: 4, power: 1, round_to: 0}", ["ladder.rules.train.lr.round_to=0"]),
        ("{valeu: 1.0}", ["ladder.rules.train.lr.valeu=1.0: unknown key", "a rule has value"]),
    ],
)
def test_impossible_rules_are_named(study_file: Path, rule: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ladder(study_file, "model.channels", "[4, 8]", f"rules: {{train.lr: {rule}}}")
    for word in words:
        assert word in str(caught.value)


def test_values_that_need_other_signs_keep_names_of_their_own() -> None:
    awkward = ["a/b", "a b", "a_b", [[1, 2], [3]], [1, [2, 3]], [1, 2, 3]]
    names = [value_name(value) for value in awkward]
    assert len(set(names)) == len(awkward)
    assert names[2] == "a_b"
    assert names[5] == "1-2-3"
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)
    assert value_name("a/b") == names[0]  # the same wherever and whenever


def test_a_study_of_lists_and_tables_reads_back_as_it_was_saved(study_file: Path, tmp_path: Path) -> None:
    before = ladder(study_file, "model.channel_mult", "[[1, 2], [1, 2, 2]]", "rules: {train.lr: {values: [0.1, 0.2]}}")
    save_config(load_study(study_file), tmp_path / "saved.yaml")
    assert trials(tmp_path / "saved.yaml") == before


def test_points_of_equal_compute_are_where_every_size_has_had_as_much(study_file: Path) -> None:
    wanted = (2e9, 5e9, 1e10)
    made = trials(study_file, "budget.flops=1e10", "evaluation.flops=[2.0e9, 5.0e9, 1.0e10]")
    for trial in made:
        assert len(trial.export_images) == 3
        assert trial.export_images[-1] == trial.total_images
        step = trial.config.train.global_batch * trial.cost.train_flops
        for flops, nimg in zip(wanted, trial.export_images, strict=True):
            assert abs(nimg * trial.cost.train_flops - flops) < step  # of the step in which it lies, the end
    small, large = made
    assert small.export_images[0] > 1.5 * large.export_images[0]


def test_points_of_compute_and_of_images_and_the_budget_are_all_taken(study_file: Path) -> None:
    small, _ = trials(study_file, "budget.flops=1e10", "evaluation={flops: [2.0e9], images: [16, 1000000]}")
    assert small.export_images[0] == 16
    assert len(small.export_images) == 3
    assert small.export_images[-1] == small.total_images


def test_a_point_beyond_the_budget_is_refused(study_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        trials(study_file, "evaluation.flops=[1.0e8, 1.0e12]")
    for word in ("trial channels4", "evaluation.flops=1e+12", "104 images", "budget.flops"):
        assert word in str(caught.value)


def test_points_of_compute_want_a_rate_that_does_not_decay(study_file: Path) -> None:
    decay = "settings={train.lr_decay: linear}"
    with pytest.raises(ConfigError, match=r"trial channels4.*train\.lr_decay=linear with evaluation\.flops"):
        trials(study_file, "budget.flops=1e10", "evaluation.flops=[2.0e9]", decay)
    assert {t.config.train.lr_decay for t in trials(study_file, decay)} == {"linear"}


def test_points_of_compute_beyond_an_extra_trials_own_budget_are_left_out(study_file: Path) -> None:
    study_file.write_text(study_file.read_text() + "extra: [{name: short, run: tiny.yaml, budget_images: 16}]\n")
    *_, extra = trials(study_file, "budget.flops=1e10", "evaluation.flops=[2.0e9]")
    assert extra.export_images == (16,)


def test_the_last_pattern_that_matches_gives_the_priority(study_file: Path) -> None:
    text = "priorities: {'channels*': 1, 'channels8-*': 5, '*-seed1': -2}\n"
    study_file.write_text(study_file.read_text() + text)
    made = {trial.name: trial.priority for trial in trials(study_file, "seeds=[0,1]")}
    assert made == {"channels4-seed0": 1, "channels4-seed1": -2, "channels8-seed0": 5, "channels8-seed1": -2}
    over = {trial.name: trial.priority for trial in trials(study_file, "seeds=[1,2]", "priorities={'channels4-*': 7}")}
    assert over["channels4-seed1"] == 7  # the command line's come last


def shapes(path: Path, resources: str) -> tuple[Shape, ...]:
    study = load_study(path, [f"resources={{{resources}}}", "settings={train.global_batch: 48}"])
    return trial_shapes(study, make_trials(study)[0])


def test_a_trial_asks_for_its_share_of_every_node(study_file: Path) -> None:
    assert shapes(study_file, "num_processes: 1, cpus: 2") == (Shape(Resources(2)),)
    assert shapes(study_file, "num_processes: 4, cpus: 6, num_nodes: 2") == (Shape(Resources(3), 2, 4),)
    wide = shapes(study_file, "num_processes: 16, gpus: 16, cpus: 128, num_nodes: 2")
    assert wide == (Shape(Resources(64, 8), 2, 16),)


def test_fewer_processes_keep_their_devices_each_and_pack_onto_fewer_nodes(study_file: Path) -> None:
    found = shapes(study_file, "num_processes: 12, gpus: 12, cpus: 24, num_nodes: 3, min_processes: 2")
    assert found == (
        Shape(Resources(8, 4), 3, 12), Shape(Resources(6, 3), 2, 6), Shape(Resources(8, 4), 1, 4),
        Shape(Resources(6, 3), 1, 3), Shape(Resources(4, 2), 1, 2),
    )  # fmt: skip
    assert shapes(study_file, "num_processes: 6, cpus: 3, num_nodes: 3, min_processes: 3") == (
        Shape(Resources(1), 3, 6), Shape(Resources(0.5), 3, 3))  # 3 on 2 nodes would be uneven  # fmt: skip


def test_where_fewer_processes_may_go_on_none_needs_more_memory(study_file: Path) -> None:
    fixed, _ = trials(study_file, "resources={num_processes: 4, cpus: 4, min_processes: 1}")
    free, _ = trials(study_file, "resources={num_processes: 4, cpus: 4}")
    assert (fixed.config.train.micro_batch, free.config.train.micro_batch) == (2, None)  # 8 images over 4


def test_an_evaluation_process_takes_what_the_study_says(study_file: Path) -> None:
    assert eval_shape(load_study(study_file, ["resources={eval_cpus: 3, eval_gpus: 1}"])) == Shape(Resources(3, 1))


def test_the_averages_that_are_measured_are_ones_that_the_trials_track(study_file: Path) -> None:
    def wanted(*overrides: str) -> set[str]:
        study = load_study(study_file, overrides)
        return {request.weights for trial in make_trials(study) for request in requests(study, trial, 104)}

    profile = "settings.train.ema_profiles=[0.05,0.1]"
    assert wanted() == {"ema"}
    assert wanted("evaluation.weights=model") == {"model"}
    assert wanted("evaluation.weights=power_0.1", profile) == {"power_0.1"}
    with pytest.raises(ConfigError, match=r"evaluation\.weights=power_0\.1 is none of its ema, model; .*ema_profiles"):
        wanted("evaluation.weights=power_0.1")


def test_log_spacing() -> None:
    assert log_spaced(100, 10_000, 3, multiple=10) == (100, 1000, 10_000)
    assert log_spaced(512, 100, 5, multiple=4) == (100,)  # a budget below the first point
    close = log_spaced(8, 32, 50, multiple=8)
    assert close == (8, 16, 24, 32)  # points that coincide are one


def test_nest() -> None:
    assert nest({"a.b": 1, "a.c": 2, "d": {"e": 3}}) == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}


def test_the_examples_of_the_page_are_studies() -> None:
    root = Path(__file__).resolve().parents[2]
    blocks = [
        yaml.safe_load(text)
        for text in re.findall(r"```yaml\n(.*?)```", (root / "docs/studies.md").read_text(), re.DOTALL)
    ]
    whole, width, depth, weights, transformers, grid = blocks
    validate(StudyConfig, whole, source="the first example")
    ladders = [validate(Ladder, example["ladder"], source="an example") for example in (width, depth)]
    assert transformers == yaml.safe_load((root / "configs/studies/imagenet64_dit.yaml").read_text())
    weighted = yaml.safe_load((root / "configs/studies/cifar10_weights_cpu.yaml").read_text())
    assert weights["ladder"] == weighted["ladder"]
    batches = [ladders[0].settings(number)["train.global_batch"] for number in range(4)]
    assert f"round_to: 32}}    # {', '.join(map(str, batches))}" in (root / "docs/studies.md").read_text()
    assert grid == yaml.safe_load((root / "configs/studies/cifar10_isoflop.yaml").read_text())
