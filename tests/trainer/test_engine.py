"""The engine's choices: precision, offloading, memory layout, DeepSpeed's own settings, steps that must be skipped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT, run_ranks
from torch import Tensor

from data_pipeline.errors import ConfigError
from trainer import deepspeed_settings as deepspeed_settings_module
from trainer.averages.rules import Exponential, PowerProfile
from trainer.checkpoint import CheckpointReader, list_checkpoints, newest_valid
from trainer.config.run import RunConfig, load_config
from trainer.deepspeed_settings import deepspeed_settings
from trainer.export import open_export
from trainer.memory import memory_of
from trainer.tracking.records import TrainRecord, read_train_records

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AVERAGES = {
    "ema": Exponential(0.9), "ema_0.5": Exponential(0.5), "ema_0.99": Exponential(0.99),
    "power_0.05": PowerProfile(0.05), "power_0.2": PowerProfile(0.2),
}  # fmt: skip
EVERY_STEP = ["train.checkpoint_every_images=8", "train.log_every_images=8"]

CHOICES: dict[str, list[str]] = {
    "fp32": [],
    "stage3": ["engine.zero_stage=3"],
    "bf16": ["engine.precision=bf16"],
    "fp16": ["engine.precision=fp16"],
    "searching": ["engine.precision=fp16", "engine.loss_scale=1.0e6", "engine.loss_scale_window=2"],
    "offloaded": ["engine.offload_optimizer=true"],
    "offloaded-stage3": ["engine.offload_optimizer=true", "engine.zero_stage=3"],
    "channels-last": ["engine.channels_last=true"],
    "small-buckets": ["engine.bucket_elements=500"],
    "checkpointed-fp16": ["engine.precision=fp16", "engine.activation_checkpointing=true"],
}


def tensors(run: Path, kind: str = "weight", checkpoint: str = "000000000048") -> dict[str, Tensor]:
    return dict(CheckpointReader(run / "checkpoints" / checkpoint).weights(kind))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative, of all weights as one vector."""
    x, y = (torch.cat([t.flatten() for t in d.values()]) for d in (a, b))
    return float((x - y).norm() / y.norm())


def records(run: Path) -> list[TrainRecord]:
    return list(read_train_records(run))


def run_scenarios(
    script: str, config: Path, folder: Path, world_size: int, runs: dict[str, list[str]], **spec: Any
) -> str:
    scenarios = [[f"run.folder={folder / name}", *overrides] for name, overrides in runs.items()]
    file = folder / "scenarios.json"
    file.write_text(json.dumps({"config": str(config), "runs": scenarios, **spec}))
    return run_ranks([f"tests/trainer/{script}.py", str(file)], world_size)


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every choice on two processes; fp16 also stopped in the middle and continued."""
    folder = tmp_path_factory.mktemp("choices")
    scenarios = {name: [*EVERY_STEP, *overrides] for name, overrides in CHOICES.items()}
    scenarios |= {"searching-in-two": [*scenarios["searching"], "train.budget_images=24"]}
    scenarios |= averaging()
    run_scenarios("train_scenarios", tiny_config, folder, 2, scenarios)
    run_scenarios("train_scenarios", tiny_config, folder, 2, {"searching-in-two": scenarios["searching"]})
    return folder


@pytest.mark.parametrize(
    ("name", "same"),
    [("offloaded", "fp32"), ("offloaded-stage3", "stage3"), ("channels-last", "fp32"), ("small-buckets", "fp32")],
)
def test_where_and_how_it_is_computed_does_not_matter(runs: Path, name: str, same: str) -> None:
    if name != "channels-last":  # other kernels: where a gradient is all rounding, Adam makes a whole step of it
        assert distance(tensors(runs / name), tensors(runs / same)) < 1e-5
    for ours, theirs in zip(records(runs / name), records(runs / same), strict=True):
        assert ours.values["train/grad_norm"] == pytest.approx(theirs.values["train/grad_norm"], rel=1e-5)
        assert ours.values["train/loss"] == pytest.approx(theirs.values["train/loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["bf16", "fp16", "checkpointed-fp16"])
def test_half_precision_is_for_computing_only(runs: Path, name: str) -> None:
    loss, exact = (records(runs / n)[-1].values["train/loss"] for n in (name, "fp32"))
    assert loss != exact
    assert loss == pytest.approx(exact, rel=1e-3)
    bits = {t.dtype for kind in ("weight", "exp_avg", "ema") for t in tensors(runs / name, kind).values()}
    assert bits == {torch.float32}
    # Master weights below the resolution of half precision: they are no rounded copies of it.
    half = torch.bfloat16 if name == "bf16" else torch.float16
    assert any(not torch.equal(t, t.to(half).float()) for t in tensors(runs / name).values())


def test_fp16_finds_its_scale_and_a_resumed_run_goes_on_with_it(runs: Path) -> None:
    scales = [r.values["train/loss_scale"] for r in records(runs / "searching")]
    skipped = [r.values["train/skipped_steps"] for r in records(runs / "searching")]
    assert (scales[0], skipped[0]) == (0.5e6, 1)
    assert 0 in skipped
    assert [r.values["train/loss_scale"] for r in records(runs / "searching-in-two")] == scales
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        straight, continued = (tensors(runs / name, kind) for name in ("searching", "searching-in-two"))
        assert all(torch.equal(straight[key], continued[key]) for key in straight)
    states = [
        CheckpointReader(runs / n / "checkpoints" / "000000000048").state for n in ("searching", "searching-in-two")
    ]
    assert states[0].loss_scale == states[1].loss_scale
    assert states[0].num_updates == states[1].num_updates == 6 - sum(skipped)


def averaging() -> dict[str, list[str]]:
    averages = ["train.extra_ema_decays=[0.5,0.99]", "train.ema_profiles=[0.05,0.2]"]
    return {f"averages-{stage}": [*EVERY_STEP, *averages, f"engine.zero_stage={stage}"] for stage in range(4)}


@pytest.mark.parametrize("stage", range(4))
def test_averages_are_those_of_the_whole_weights_bit_for_bit(runs: Path, stage: int) -> None:
    check_averages(runs, stage)


@pytest.mark.prove
def test_averages_on_one_process_are_too(tiny_config: Path, tmp_path: Path) -> None:
    run_scenarios("train_scenarios", tiny_config, tmp_path, 1, averaging())
    for stage in range(4):
        check_averages(tmp_path, stage)


def check_averages(runs: Path, stage: int) -> None:
    run = runs / f"averages-{stage}"
    history = [tensors(run, checkpoint=path.name) for path in reversed(list_checkpoints(run / "checkpoints"))]
    start = initial_weights(runs)
    for name, rule in AVERAGES.items():
        averages = {key: value.clone() for key, value in start.items()}
        for step, weights in enumerate(history):
            for key in averages:
                averages[key].lerp_(weights[key], 1 - rule.decay(step))
        kept = tensors(run, name)
        assert all(torch.equal(averages[key], kept[key]) for key in averages), name
        exported = open_export(run / "exports" / "000000000048").tensors(name)
        assert all(torch.equal(averages[key], exported[key]) for key in averages), name
    assert open_export(run / "exports" / "000000000048").weights_sha256.keys() == {*AVERAGES, "model"}


def initial_weights(runs: Path) -> dict[str, Tensor]:
    from trainer.models import build_model

    config = load_config(runs / "averages-0" / "config.yaml")
    torch.manual_seed(config.seed)
    return {n: p.detach() for n, p in build_model(config.model, config.diffusion).named_parameters()}


# ---- steps that are not finite ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One process's third step is NaN, at every stage; and a run whose steps are all NaN from the fourth on."""
    folder = tmp_path_factory.mktemp("poisoned")
    stages = {f"stage-{stage}": [*EVERY_STEP, f"engine.zero_stage={stage}"] for stage in range(4)}
    text = run_scenarios("poisoned_scenarios", tiny_config, folder, 2, stages, poison=[[1, 16, 16]])
    hopeless = [*EVERY_STEP, "train.max_skipped_steps=2", "train.budget_images=400"]
    importance = ["diffusion.num_timesteps=3", "diffusion.objective=vlb", "train.export_images=[]"]
    importance = [*hopeless, *importance, "diffusion.timestep_sampler=loss_second_moment"]
    runs = {"hopeless": hopeless, "importance": importance}
    return folder, text + run_scenarios("poisoned_scenarios", tiny_config, folder, 2, runs, poison=[[1, 120, 999]])


@pytest.mark.parametrize("stage", range(4))
def test_one_processes_bad_step_is_skipped_by_all(poisoned: tuple[Path, str], stage: int) -> None:
    run = poisoned[0] / f"stage-{stage}"
    before, after, later = (tensors(run, checkpoint=f"{nimg:012d}") for nimg in (16, 24, 32))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert distance(later, after) > 0
    for kind in ("exp_avg", "exp_avg_sq"):
        old, new = (tensors(run, kind, f"{nimg:012d}") for nimg in (16, 24))
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert CheckpointReader(run / "checkpoints" / "000000000048").state.num_updates == 5
    assert [r.values["train/skipped_steps"] for r in records(run)] == [0, 0, 1, 0, 0, 0]
    assert [r.values["train/skipped_in_a_row"] for r in records(run)] == [0, 0, 1, 0, 0, 0]


def test_a_hopeless_run_stops_with_its_reason_and_its_checkpoints(poisoned: tuple[Path, str]) -> None:
    folder, text = poisoned
    assert "2 steps in a row, up to 136 images" in text
    assert "process 1: all layers gave finite values, but the loss is not finite for t = " in text
    assert "train.max_skipped_steps=2" in text
    path, skipped = newest_valid(folder / "hopeless" / "checkpoints")
    assert path is not None
    assert not skipped
    assert all(t.isfinite().all() for t in dict(CheckpointReader(path).weights("weight")).values())
    assert len(records(folder / "hopeless")) <= 19  # it did not go on for ever


def test_what_is_diagnosed_is_the_step_itself(poisoned: tuple[Path, str]) -> None:
    """The importance sampler has moved on since: the timesteps named are those that were drawn, not new ones."""
    folder, text = poisoned
    run = folder / "importance"
    assert records(run)[-1].values["train/timestep_sampler_warmed_up"] == 1
    told = re.findall(r"not finite for t = ([\d, ]+) \(images ([\d, ]+)\)", text)[-1]
    steps, images = ([int(word) for word in words.split(",")] for words in told)
    drawn = json.loads((folder / "drawn.json").read_text())
    assert steps == drawn[str(images[0] - 4)]
    assert len(steps) == 4


# ---- DeepSpeed's own settings ------------------------------------------------------------------------------------


def settings(config: RunConfig, device: torch.device = CPU) -> dict[str, Any]:
    return deepspeed_settings(config, device, micro_batch=4, accumulation=2, num_params=1000)


def test_settings_follow_the_config(tiny_config: Path) -> None:
    told = settings(load_config(tiny_config, ["engine.zero_stage=2"]), CUDA)
    assert told["zero_optimization"] == {
        "stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000,
        "compute_grad_norm": False,
    }  # fmt: skip
    assert (told["train_batch_size"], told["gradient_accumulation_steps"]) == (8, 2)
    told = settings(load_config(tiny_config, ["engine.zero_stage=3", "engine.offload_optimizer=true"]), CUDA)
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert settings(load_config(tiny_config, ["engine.zero_stage=0"]))["zero_optimization"] == {"stage": 0}


def test_further_settings_are_merged_from_the_command_line_or_a_file(tiny_config: Path, tmp_path: Path) -> None:
    more = {"comms_logger": {"enabled": True}, "zero_optimization": {"stage": 1, "allgather_partitions": False}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(more | {"train_batch_size": "auto"}))
    config = load_config(tiny_config, [f"engine.deepspeed={file}"])
    told = settings(config)
    assert told["comms_logger"] == {"enabled": True}
    assert told["zero_optimization"]["allgather_partitions"] is False
    assert told["zero_optimization"]["stage"] == 1
    assert told["train_batch_size"] == 8
    shutil.move(file, tmp_path / "gone")
    assert config.engine.deepspeed["comms_logger"] == {"enabled": True}  # they travel with the run


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "engine.deepspeed.zero_optimization.stage=2",
            r"zero_optimization\.stage=2 contradicts.*1; set engine\.zero_st",
        ),
        ("engine.deepspeed.train_batch_size=9", r"train_batch_size=9 contradicts.*8; set train\.global_batch"),
        ("engine.deepspeed.gradient_clipping=1", r"gradient_clipping=1 cannot be used.*train\.grad_clip"),
        ("engine.deepspeed.fp16.enabled=true", r"fp16=.*engine\.precision=fp16"),
        ("engine.deepspeed.zero_optimization.offload_param.device=cpu", r"offload_param=.*engine\.offload_optimizer"),
        ("engine.deepspeed.steps_per_print=5", r"steps_per_print=5 contradicts.*leave it out"),
        (
            "engine.deepspeed.zero_optimization.compute_grad_norm=true",
            r"contradicts.*False; leave it out",
        ),
        ("engine.deepspeed.zero_allow_untested_optimizer=false", r"contradicts.*project's own AdamW"),
        ("engine.deepspeed.gradient_allreduce_op=sum", r"gradient_allreduce_op='sum' contradicts.*mean over its batch"),
        ("engine.deepspeed.managed_gradient_accumulation=false", r"contradicts.*the loop counts on it"),
        ("engine.deepspeed.tensor_parallel.autotp_size=2", r"tensor_parallel=.*every process has the whole network"),
        ("engine.deepspeed.zero_optimization.zero_quantized_gradients=true", r"reduced as they are"),
        ("engine.deepspeed.zero_optimization.zero_quantized_nontrainable_weights=true", r"weights are float32"),
        ("engine.deepspeed.zero_optimization.cpu_offload=true", r"cpu_offload=True.*engine\.offload_optimizer"),
        ("engine.deepspeed.data_efficiency.enabled=true", r"data_efficiency=.*bit for bit"),
        ("engine.deepspeed.curriculum_learning.enabled=true", r"curriculum_learning=.*bit for bit"),
        ("engine.deepspeed.sparse_gradients=true", r"sparse_gradients=True.*dense"),
        ("engine.deepspeed.pipeline.stages=2", r"pipeline=.*whole network"),
        ("engine.deepspeed.autotuning.enabled=true", r"autotuning=.*--auto-micro-batch"),
        ("engine.deepspeed.compression_training.weight_quantization.shared=1", r"compression_training=.*float32"),
        # Names that DeepSpeed would pass over in silence, and values that it would stumble over.
        ("engine.deepspeed.zero_optimizaton.stage=1", r"not known to DeepSpeed; did you mean zero_optimization\?"),
        ("engine.deepspeed.zero_optimization.foo=1", r"zero_optimization\.foo=1 is not known"),
        (
            "engine.deepspeed.zero_optimization.prefetch_bucket_size=1",
            r"did you mean zero_optimization\.stage3_prefetch_bucket_size\?",
        ),
        (
            "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size=many",
            r"stage3_prefetch_bucket_size='many' must be a whole number",
        ),
        ("engine.deepspeed.zero_optimization.stage3_max_live_parameters=.inf", r"=inf must be a whole number"),
        ("engine.deepspeed.zero_optimization.reduce_scatter=2", r"reduce_scatter=2 must be true, false or auto"),
    ],
)
def test_contradictions_are_refused(tiny_config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(load_config(tiny_config, [override]))


@pytest.mark.parametrize("stage", range(4))
def test_auto_and_what_is_off_change_nothing(tiny_config: Path, stage: int) -> None:
    """A file as other programs fill it in, all of it left to them."""
    zero = {
        "stage": stage, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "overlap_comm": "auto",
        "offload_param": {"device": "none"}, "zero_quantized_weights": False, "sub_group_size": "auto",
    }  # fmt: skip
    theirs = {
        "train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": zero, "optimizer": "auto",
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}, "bf16": {"enabled": False},
        "amp": {"enabled": False}, "torch_autocast": {"enabled": False, "dtype": "bfloat16"}, "scheduler": None,
        "elasticity": {}, "gradient_allreduce_op": "mean",
    }  # fmt: skip
    config = load_config(tiny_config, [f"engine.zero_stage={stage}"])
    added = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": theirs})})
    assert settings(added) == settings(config)
    assert memory_of(added, 2) == memory_of(config, 2)


def test_auto_within_the_users_own_settings_is_left_out(tiny_config: Path) -> None:
    override = "engine.deepspeed.flops_profiler={enabled: false, profile_step: auto}"
    assert settings(load_config(tiny_config, [override]))["flops_profiler"] == {"enabled": False}


def test_what_is_free_replaces_ours_and_reaches_the_plan(tiny_config: Path) -> None:
    stage3, key = "engine.zero_stage=3", "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size"
    told = [settings(load_config(tiny_config, [stage3, *more])) for more in ([], [f"{key}=1e3"])]
    assert [t["zero_optimization"]["stage3_prefetch_bucket_size"] for t in told] == [5_000_000, 1000]
    plenty, little = (memory_of(load_config(tiny_config, [stage3, f"{key}={n}"]), 2) for n in ("auto", 0))
    assert little.weights <= plenty.weights


def test_every_name_is_one_of_deepspeeds() -> None:
    """The lists against DeepSpeed itself."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    ours = {n.partition(".")[2] for n in {**deepspeed_settings_module._REFUSED, **deepspeed_settings_module._OURS}}
    known = deepspeed_settings_module._ZERO_NUMBERS | deepspeed_settings_module._ZERO_SWITCHES | ours - {""}
    older = {"stage3_gather_fp16_weights_on_model_save"}  # another name for one that is known
    assert names - older - known == {"leaf_module"}
    assert known - names == {"mics_shard_size"}  # of a class of its own


def test_what_deepspeed_itself_refuses_is_the_users_error(tiny_config: Path, tmp_path: Path) -> None:
    overrides = [f"run.folder={tmp_path / 'run'}", "engine.deepspeed.comms_logger={verbose: perhaps}"]
    done = subprocess.run(
        [sys.executable, "trainer/run.py", "--config", str(tiny_config), *overrides], cwd=ROOT, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "engine.deepspeed={'comms_logger': {'verbose': 'perhaps'}}: DeepSpeed cannot work with" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.deepspeed=nowhere.json", r"engine\.deepspeed=nowhere\.json: no JSON file"),
        ("engine.offload_optimizer=true engine.zero_stage=0", r"offload_optimizer=true needs.*zero_stage=1"),
        ("engine.loss_scale=0.5", r"engine\.loss_scale=0\.5 starts below engine\.loss_scale_floor=1"),
        ("train.extra_ema_decays=[0.9]", r"extra_ema_decays=\[0\.9\].*train\.ema_decay=0\.9"),
        ("train.extra_ema_decays=[1.0]", r"numbers from 0 to below 1"),
        ("train.extra_ema_decays=[0.5,0.5]", r"different numbers"),
    ],
)
def test_impossible_choices_are_refused(tiny_config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(tiny_config, override.split())


@pytest.mark.prove
def test_compiled_is_as_eager(tiny_config: Path, tmp_path: Path) -> None:
    runs = {"eager": EVERY_STEP, "compiled": [*EVERY_STEP, "engine.compile=true"]}
    file = tmp_path / "scenarios.json"
    file.write_text(
        json.dumps({"config": str(tiny_config), "runs": [[f"run.folder={tmp_path / n}", *o] for n, o in runs.items()]})
    )
    run_ranks(["tests/trainer/train_scenarios.py", str(file)], 1, timeout=900)
    for ours, theirs in zip(records(tmp_path / "compiled"), records(tmp_path / "eager"), strict=True):
        assert ours.values["train/loss"] == pytest.approx(theirs.values["train/loss"], rel=1e-4)
