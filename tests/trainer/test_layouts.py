"""The same run on any ZeRO stage and number of processes; resumed bit for bit, or on another layout.

Real DeepSpeed with one and two real processes. Scenarios of one number of processes share a process life, since
starting one takes seconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from trainer.export import open_export

HALF, FULL = 24, 48
PROFILES = ["train.ema_profiles=[0.1]", "train.ema_snapshot_every_images=24"]
IMPORTANCE = ["diffusion.objective=vlb", "diffusion.timestep_sampler=loss_second_moment", "diffusion.num_timesteps=4"]
# Everything about the inputs that depends on an image's place in the global batch, in one run.
PLACES = ["diffusion.prediction=v", "diffusion.timestep_sampler=stratified", "model.num_classes=4",
          "model.null_class=true", "train.class_dropout=0.4", "model.low_res_size=8",
          "model.low_res_noise.max_step=60", "train.micro_batch=2"]  # fmt: skip


def weights(run: Path, nimg: int = FULL) -> dict[str, torch.Tensor]:
    export = run / "exports" / f"{nimg:012d}"
    tensors = {}
    for kind in ("model", "ema", "power_0.1"):
        tensors |= {f"{kind}.{name}": t for name, t in load_file(export / f"{kind}.safetensors").items()}
    return tensors


def relative_difference(run: Path, other: Path) -> float:
    """Norm of the difference of all weights and averages, relative to theirs; 0.0 only when every bit is equal."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    square = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    norm = sum(float(theirs[name].double().square().sum()) for name in theirs)
    return (square / norm) ** 0.5


def snapshots(run: Path) -> dict[str, str]:
    """The checksums of the averages that are kept, by images seen."""
    folders = sorted((run / "ema_snapshots").iterdir())
    assert [folder.name for folder in folders] == [f"{nimg:012d}" for nimg in (HALF, FULL)]
    return {folder.name: open_export(folder).weights_sha256["power_0.1"] for folder in folders}


def losses(run: Path) -> dict[int, float]:
    found = {}
    for path in run.glob("metrics.*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[record["nimg"]] = record["values"]["train/loss"]
    return found


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders s<stage>w<processes>: whole runs; resumed-*: runs stopped half way and continued."""
    base = tmp_path_factory.mktemp("layouts")

    def train(world: int, scenarios: list[list[str]]) -> None:
        spec = base / "spec.json"
        spec.write_text(json.dumps({"config": str(tiny_config), "runs": scenarios}))
        run_ranks(["tests/trainer/train_scenarios.py", str(spec)], world)

    # Wide enough that every normalisation group has two channels: a group of one makes the bias before it idle, and
    # Adam then turns the rounding noise of its zero gradient into steps that differ between layouts. (Elements with
    # tiny gradients do so in any net: weights are compared as a whole, the loss closely.)
    def scenario(name: str, stage: int, *more: str) -> list[str]:
        return [f"run.folder={base / name}", f"engine.zero_stage={stage}", "model.channels=40", *PROFILES, *more]

    for world in (1, 2):
        whole = [scenario(f"s{stage}w{world}", stage) for stage in (0, 1, 2, 3)]
        half = [scenario(f"half-s{s}w{world}", s, f"train.budget_images={HALF}") for s in (1, 2, 3)]
        vlb = [scenario("vlb", 2, *IMPORTANCE), scenario("half-vlb", 2, *IMPORTANCE, f"train.budget_images={HALF}")]
        places = scenario(f"places-w{world}", 2 * world - 1, *PLACES)
        again = scenario(f"checkpointed-w{world}", 2 * world - 1, *PLACES, "engine.activation_checkpointing=true")
        half.append(scenario(f"half-places-w{world}", 2 * world - 1, *PLACES, f"train.budget_images={HALF}"))
        train(world, whole + half + [places, again] + (vlb if world == 2 else []))
    for source, target in [(f"half-s{s}w2", f"resumed-s{s}w2") for s in (1, 2, 3)] + [
        ("half-vlb", "resumed-vlb"), ("half-places-w2", "resumed-places"), ("half-s3w2", "moved-s3w2-to-s1w1"),
        ("half-s1w1", "moved-s1w1-to-s3w2"), ("half-s2w2", "moved-s2w2-to-s0w2"),
    ]:  # fmt: skip
        shutil.copytree(base / source, base / target)
    train(2, [scenario(f"resumed-s{s}w2", s) for s in (1, 2, 3)] + [
        scenario("resumed-vlb", 2, *IMPORTANCE), scenario("resumed-places", 3, *PLACES),
        scenario("moved-s1w1-to-s3w2", 3), scenario("moved-s2w2-to-s0w2", 0),
    ])  # fmt: skip
    train(1, [scenario("moved-s3w2-to-s1w1", 1)])
    return base


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_layout_trains_the_same_weights(runs: Path, stage: int, world: int) -> None:
    assert relative_difference(runs / f"s{stage}w{world}", runs / "s0w1") < 1e-5
    expected = losses(runs / "s0w1")
    found = losses(runs / f"s{stage}w{world}")
    assert found.keys() == expected.keys()
    assert all(found[n] == pytest.approx(expected[n], rel=1e-6) for n in expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume_on_the_same_layout_is_bit_exact(runs: Path, stage: int) -> None:
    resumed, straight = runs / f"resumed-s{stage}w2", runs / f"s{stage}w2"
    assert (resumed / f"metrics.{HALF}.jsonl").exists()  # it did resume, not start again
    assert relative_difference(resumed, straight) == 0.0
    assert losses(resumed)[FULL] == losses(straight)[FULL]
    assert snapshots(resumed) == snapshots(straight)


def test_stratified_draws_and_dropped_classes_are_the_global_batchs(runs: Path) -> None:
    one, two = losses(runs / "places-w1"), losses(runs / "places-w2")  # ZeRO 1 on one process, 3 on two
    assert all(two[n] == pytest.approx(one[n], rel=1e-6) for n in one)
    assert relative_difference(runs / "places-w1", runs / "places-w2") < 1e-5


def test_resume_is_bit_exact_where_all_that_can_be_drawn_is(runs: Path) -> None:
    assert (runs / "resumed-places" / f"metrics.{HALF}.jsonl").exists()
    assert relative_difference(runs / "resumed-places", runs / "places-w2") == 0.0
    assert losses(runs / "resumed-places")[FULL] == losses(runs / "places-w2")[FULL]


@pytest.mark.parametrize("world", [1, 2])
def test_activation_checkpointing_changes_no_bit(runs: Path, world: int) -> None:
    assert relative_difference(runs / f"checkpointed-w{world}", runs / f"places-w{world}") == 0.0


def test_importance_sampling_history_survives_a_resume(runs: Path) -> None:
    assert relative_difference(runs / "resumed-vlb", runs / "vlb") == 0.0
    [*_, checkpoint] = sorted((runs / "vlb" / "checkpoints").iterdir())
    state, resumed = (
        load_file(runs / name / "checkpoints" / checkpoint.name / "sampler.safetensors")
        for name in ("vlb", "resumed-vlb")
    )
    assert int(state["counts"].sum()) == FULL  # every image's loss was taken in, over both processes
    assert all(torch.equal(state[key], resumed[key]) for key in state)


@pytest.mark.parametrize("name", ["moved-s3w2-to-s1w1", "moved-s1w1-to-s3w2", "moved-s2w2-to-s0w2"])
def test_a_run_moves_to_another_layout(runs: Path, name: str) -> None:
    moved = runs / name
    assert (moved / f"metrics.{HALF}.jsonl").exists()
    assert relative_difference(moved, runs / "s0w1") < 1e-5
    assert losses(moved)[FULL] == pytest.approx(losses(runs / "s0w1")[FULL], rel=1e-6)
