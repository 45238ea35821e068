"""Configs: inheritance, overrides, and errors that name key, value and remedy."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from trainer.config.model import ClassifierConfig
from trainer.config.run import RunConfig, load_config
from trainer.config.tree import save_config
from trainer.run_folder import check_same_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs" / "runs").rglob("*.yaml"))


@pytest.mark.parametrize("module", ["trainer.config.run", "cluster.definition.spec"])
def test_reading_a_config_takes_no_torch(module: str) -> None:
    """Commands that only read one answer at once."""
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_bases_merge_by_key_and_lists_are_replaced(tmp_path: Path, tiny_config: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"base: {tiny_config}\nmodel: {{channel_mult: [1, 2, 2]}}\ntrain: {{lr: 0.5}}\n")
    config = load_config(child, ["train.lr=0.25", "seed=7", "train.export_images=[8,16]"])
    assert config.model.channel_mult == (1, 2, 2)
    assert config.model.channels == load_config(tiny_config).model.channels
    assert (config.train.lr, config.seed, config.train.export_images) == (0.25, 7, (8, 16))


def test_a_budget_on_the_command_line_replaces_the_other_kind(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["train.budget_flops=1e9"])
    assert (config.train.budget_images, config.train.budget_flops) == (None, 1e9)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lrr=1", ["train.lrr=1", "unknown key", "did you mean 'lr'"]),
        ("optimizer.lr=1", ["optimizer", "unknown key", "known keys here"]),
        ("train.lr=fast", ["train.lr='fast'", "valid number"]),
        ("train.global_batch=0", ["train.global_batch=0", "greater than or equal to 1"]),
        ("model.channels=10", ["model.channels=10", "num_heads", "multiple of num_heads"]),
        ("model.image_size=15", ["model.image_size=15", "multiple of 2"]),
        ("model.channels=7", ["model.channels=7"]),
        ("model.low_res_size=5", ["model.low_res_size=5", "divide"]),
        ("diffusion.objective=simple", ["diffusion.objective=simple", "fixed_small"]),
        ("diffusion.variance=fixed_small", ["diffusion.variance=fixed_small", "learned_range"]),
        ("train.micro_batch=3", ["train.micro_batch=3", "train.global_batch=8"]),
        ("diffusion.variance=fixed_large", ["diffusion.variance=fixed_large", "learned_range"]),
        ("diffusion.prediction=score", ["diffusion.prediction='score'", "'eps', 'x0', 'v' or 'previous_mean'"]),
        ("diffusion.vlb_weight=some", ["diffusion.vlb_weight='some'", "'rescaled' or 'unrescaled'", "valid number"]),
        ("diffusion.vlb_weight=inf", ["diffusion.vlb_weight='inf'", "finite"]),
        ("train.sample_grid.respacing=true", ["train.sample_grid.respacing=True", "valid string"]),
        ("diffusion.vlb_weight=-1", ["diffusion.vlb_weight=-1", "greater than 0"]),
        ("train.sample_grid={num_images: 4, respacing: ddim33}", ["train.sample_grid.respacing", "ddim25 or ddim34"]),
        ("train.sample_grid={num_images: 4, respacing: 101}", ["train.sample_grid.respacing", "100 or fewer"]),
        ("train.sample_grid={sampler: ancestral, eta: 0.5}", ["train.sample_grid.eta=0.5", "sampler=ancestral"]),
        ("train.sample_grid.eta=2", ["train.sample_grid.eta=2"]),
        ("train.sample_grid={num_images: 4, respacing: karras101}", ["train.sample_grid.respacing", "karras100"]),
        ("train.sample_grid.threshold=dynamic", ["train.sample_grid", "threshold_quantile", "0.995"]),
        ("train.class_dropout=0.1", ["train.class_dropout=0.1", "model.null_class=true"]),
        ("engine.zero_stage=4", ["engine.zero_stage=4"]),
        ("train.ema_profiles=0.05", ["train.ema_profiles=0.05: a list", "with commas", "train.ema_profiles=[0.05]"]),
        ("train.betas={a: 1}", ["train.betas={'a': 1}: a list is expected", "between several."]),
        ("model.low_res_noise=true", ["low_res_noise=True: a section", "keys are max_step, num_timesteps, schedule."]),
        ("model.low_res_noise.max_stepp=5", ["model.low_res_noise.max_stepp=5", "did you mean 'max_step'"]),
        ("train.sample_grid=true", ["train.sample_grid=True: a section", "keys are", "num_images"]),
        ("diffusion.sigmoid_tau=0.5", ["diffusion.sigmoid_tau=0.5", "schedule=cosine", "schedule=sigmoid"]),
        ("diffusion={schedule: sigmoid, sigmoid_tau: 0.1}", ["sigmoid_tau=0.1", "steep", "0.2"]),
        ("diffusion={schedule: sigmoid, sigmoid_end: -4}", ["sigmoid_start=-3", "sigmoid_end=-4"]),
        ("diffusion.min_snr_gamma=1", ["diffusion.min_snr_gamma=1", "loss_weight=none", "loss_weight=min_snr"]),
        ("diffusion={objective: vlb, loss_weight: min_snr}", ["diffusion.loss_weight=min_snr", "objective=simple"]),
        ("train.budget_images=null", ["train.budget_images", "train.budget_flops"]),
        ("justaword", ["justaword", "section.key=value"]),
    ],
)
def test_errors_name_key_value_and_remedy(tiny_config: Path, override: str, expected: list[str]) -> None:
    overrides = [override] if "num_heads" not in expected else [override, "model.num_heads=3"]
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config, overrides)
    for part in expected:
        assert part in str(caught.value)


CLASSIFIER = (
    "model={name: classifier, channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [8], "
    "num_heads: 2, num_classes: 4}",
    "diffusion.objective=cross_entropy",
)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["diffusion.objective=hybrid"], ["diffusion.objective=hybrid", "use diffusion.objective=cross_entropy"]),
        (["model.name=unet"], ["diffusion.objective=cross_entropy", "model.name=unet", "simple, hybrid or vlb"]),
        (["diffusion.variance=learned"], ["diffusion.variance=learned", "leave it out, or at learned_range"]),
        (["diffusion.prediction=v"], ["diffusion.prediction=v", "leave it out, or at eps"]),
        (["diffusion.mse_target=x0"], ["diffusion.mse_target=x0", "leave it out, or at null"]),
        (["diffusion.vlb_weight=0.5"], ["diffusion.vlb_weight=0.5", "leave it out, or at rescaled"]),
        (["diffusion.timestep_sampler=loss_second_moment"], ["loss_second_moment", "use uniform or stratified"]),
        (["train.sample_grid.num_images=4"], ["train.sample_grid.num_images=4", "makes no images", "set it to 0"]),
        (["train.class_dropout=0.1"], ["train.class_dropout=0.1", "set it to 0"]),
    ],
)
def test_what_a_classifier_cannot_be_told(tiny_config: Path, overrides: list[str], expected: list[str]) -> None:
    assert load_config(tiny_config, CLASSIFIER).is_classifier
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config, [*CLASSIFIER, *overrides])
    for part in expected:
        assert part in str(caught.value)


def test_linear_schedule_that_cannot_be(tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_timesteps=20.*linear"):
        load_config(tiny_config, ["diffusion.schedule=linear", "diffusion.num_timesteps=20"])


@pytest.mark.parametrize("text", ["a: [", "just text", "base: other.yaml"])
def test_broken_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml|other\.yaml"):
        load_config(path)


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")


def test_configs_written_before_keys_had_their_names(tiny_config: Path, tmp_path: Path) -> None:
    """Runs and exports hold their config: what they were made with is still read, and means what it meant."""
    text = save_and_read(load_config(tiny_config), tmp_path / "new.yaml")
    for number, name in (("0.001", "rescaled"), ("0.01", "unrescaled"), ("0.5", 0.5)):  # T is 100
        (tmp_path / "old.yaml").write_text(text.replace("vlb_weight: rescaled", f"vlb_weight: {number}"))
        assert load_config(tmp_path / "old.yaml").diffusion.vlb_weight == name
    for steps, respacing in (("25", "25"), ("250", "100")):
        (tmp_path / "old.yaml").write_text(text.replace("respacing: '50'", f"num_steps: {steps}"))
        assert load_config(tmp_path / "old.yaml").train.sample_grid.respacing == respacing
    old = load_config(tmp_path / "old.yaml")
    check_same_run(old, load_config(tiny_config), tmp_path)  # it can be continued


NETWORKS = {
    "unet": ("model.name=unet",),
    "dit": ("model={name: dit, image_size: 16, patch_size: 4, depth: 2, width: 32, num_heads: 2}",),
    "classifier": CLASSIFIER,
}


@pytest.mark.parametrize(("before", "after"), permutations(NETWORKS, 2))
def test_a_run_goes_on_with_no_other_network(tiny_config: Path, before: str, after: str) -> None:
    old, new = (load_config(tiny_config, NETWORKS[name]) for name in (before, after))
    with pytest.raises(ConfigError) as caught:
        check_same_run(old, new, Path("runs/old"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "runs/old holds a run with other settings:"
    assert lines[1:-1] == [f"  model.name: {before} -> {after}"]  # which says all that follows from it
    assert "choose another run.folder" in lines[-1]


def save_and_read(config: RunConfig, path: Path) -> str:
    save_config(config, path)
    return path.read_text()


def test_the_old_name_of_respacing_beside_the_new_one_is_explained(tiny_config: Path) -> None:
    assert load_config(tiny_config, ["train.sample_grid.num_steps=7"]).train.sample_grid.respacing == "7"
    with pytest.raises(ConfigError, match=r"train\.sample_grid\.num_steps=7: this key is named respacing now"):
        load_config(tiny_config, ["train.sample_grid.respacing=50", "train.sample_grid.num_steps=7"])


def test_missing_sections_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("name: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(f"{key}: missing" in str(caught.value) for key in ("run", "data", "model", "train"))
    assert RunConfig.model_fields.keys() >= {"run", "data", "model", "train"}


def test_the_order_of_overrides_does_not_matter_for_another_network(tiny_config: Path) -> None:
    words = ["model.pool=adaptive", "model.num_classes=2", "model.name=classifier", "diffusion.objective=cross_entropy"]
    kept = ["model.channels=8", "model.channel_mult=[1,2]", "model.num_res_blocks=1", "model.num_heads=1"]
    one, other = (load_config(tiny_config, order) for order in ([*words, *kept], [*kept, *reversed(words)]))
    assert one == other
    assert isinstance(one.model, ClassifierConfig)
    assert one.model.pool == "adaptive"
