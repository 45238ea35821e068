"""Runs cannot be lost: kill -9 at any moment, on any process, and the run that goes on is the run without a kill.

Compared bit for bit: weights, moments, averages, the timestep sampler's history, counts of updates, exports and what
was logged. `make prove` does it at length.
"""

from __future__ import annotations

import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from kill_harness import (
    EVERYWHERE,
    ON_MAIN,
    Kill,
    KilledRun,
    Life,
    Tally,
    assert_same_run,
    inputs_seen,
    logged,
    newest_checkpoint,
    sampler_state,
    start_server,
)

from trainer.diffusion.timesteps import HISTORY, LossSecondMomentSampler

BATCH, INTERVAL = 8, 16  # images a step; between two checkpoints, of the shortest runs
NET = ["model.channels=4", "model.channel_mult=[1]", "model.attention_resolutions=[]", "engine.peak_flops=1e11"]
IMPORTANCE = ["diffusion.objective=vlb", "diffusion.timestep_sampler=loss_second_moment",
              "diffusion.num_timesteps=20", "train.global_batch=16"]  # fmt: skip
BEFORE_THE_RENAME = (*EVERYWHERE, "before the manifest", "before the rename")
KILLS = [Kill(point, rank, rank) for point in EVERYWHERE for rank in (0, 1)]
KILLS += [Kill(point, 0, victim) for point in ON_MAIN for victim in (0, 1)]


@pytest.fixture(scope="module")
def command(tiny_config: Path) -> list[str]:
    start_server()
    return ["--config", str(tiny_config), *NET]


def budget(images: int, checkpoint_every: int, export_every: int) -> list[str]:
    moments = list(range(export_every, images + 1, export_every))
    return [f"train.budget_images={images}", f"train.checkpoint_every_images={checkpoint_every}",
            f"train.export_images={moments}", "train.keep_checkpoints=1",
            "train.ema_profiles=[0.1]", f"train.ema_snapshot_every_images={export_every}"]  # fmt: skip


def train_straight(arguments: list[str], folder: Path, world_size: int = 2) -> Life:
    """The run that nobody kills; keeps all of its checkpoints."""
    return KilledRun([*arguments, "train.keep_checkpoints=999"], folder, Tally(), world_size=world_size).finish()


# ---- at every point of a save ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "steps", "kills"),
    [
        pytest.param(1, 40, [k for k in KILLS if k.at == k.victim or k.point in BEFORE_THE_RENAME], id="short"),
        *(pytest.param(s, 200, KILLS, marks=pytest.mark.prove, id=f"stage{s}") for s in (1, 2, 3)),
    ],
)
@pytest.mark.timeout(900)
def test_killed_at_every_point_of_a_save(
    command: list[str], tmp_path: Path, stage: int, steps: int, kills: list[Kill]
) -> None:
    arguments = [*command, f"engine.zero_stage={stage}", *budget(steps * BATCH, INTERVAL, INTERVAL)]
    began, straight = time.monotonic(), tmp_path / "straight"
    train_straight(arguments, straight)
    run = KilledRun(arguments, tmp_path / "run", Tally(), straight=straight)
    for kill in kills:
        before = run.newest()
        life = run.die_at(kill)
        begun = next(nimg for _, nimg, what in life.events() if what == "writing")
        assert begun == before + INTERVAL, life.text()
        if kill.victim == kill.at:  # else the main process may have come to the end of the checkpoint
            assert run.newest() == (before if kill.point in BEFORE_THE_RENAME else begun), life.text()
        if kill.point == "in the shard":
            name = f"rank-{kill.victim:05d}.safetensors"
            whole = straight / f"checkpoints/{begun:012d}" / name
            assert 0 < (run.folder / f"checkpoints/.{begun:012d}.tmp" / name).stat().st_size < whole.stat().st_size
    run.finish()
    assert_same_run(run.folder, straight)
    assert run.tally.stuck == 0
    run.tally.seconds = time.monotonic() - began
    print(f"\nZeRO {stage}, at every point of a save: {run.tally}")


# ---- at random moments ----------------------------------------------------------------------------------------------


def kill_at_random(arguments: list[str], base: Path, rng: random.Random, kills: int, *, warm_up: bool = False) -> Tally:
    """Run after run under kills, until there were enough; each ends as the straight one. `warm_up`: not before that."""
    began = time.monotonic()
    straight, tally = base / "straight", Tally()
    life = train_straight(arguments, straight)
    start_up = life.first_step() - life.began
    steps = [when for when, _, what in life.events() if what == "step"]
    span = (steps[-1] - steps[0]) / 8
    while tally.kills.total() < kills:
        run = KilledRun(arguments, base / f"run-{tally.runs}", tally, straight=straight)
        if warm_up:
            life = run.start()
            life.sleep(240, until=partial(is_warm, run.folder))
            assert is_warm(run.folder)
            run.kill(life, rng.randrange(2))
        while not run.finished and tally.kills.total() < kills:
            life = run.die_at_random(rng, start_up, span)
            start_up = min(start_up, life.first_step() - life.began)
        if not run.finished:
            run.finish()
        assert_same_run(run.folder, straight)
        if warm_up:
            assert is_warm(run.folder)
    tally.seconds = time.monotonic() - began
    assert tally.stuck == 0, tally
    return tally


def is_warm(run: Path) -> bool:
    """Whether the sampler of the newest checkpoint has left its warm-up, and draws unevenly."""
    state = sampler_state(run)
    if not state or int(state["counts"].min()) < HISTORY:
        return False
    sampler = LossSecondMomentSampler(20)
    sampler.load(state)
    p = sampler.probabilities()
    assert p.max() > 1.1 * p.min()  # weights are 1 / (T p): as uneven
    return True


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_at_random_moments(command: list[str], tmp_path: Path, stage: int) -> None:
    arguments = [*command, f"engine.zero_stage={stage}", *budget(24 * BATCH, 3 * BATCH, 9 * BATCH)]
    print(f"\nZeRO {stage}: {kill_at_random(arguments, tmp_path, random.Random(stage), 3)}")


def test_killed_with_importance_sampling_after_its_warm_up(command: list[str], tmp_path: Path) -> None:
    arguments = [*command, *IMPORTANCE, "engine.zero_stage=2", *budget(56 * 16, 4 * 16, 16 * 16)]
    print(f"\nimportance: {kill_at_random(arguments, tmp_path, random.Random(0), 2, warm_up=True)}")


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("importance", [False, True], ids=["uniform", "importance"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_soak(command: list[str], tmp_path: Path, stage: int, importance: bool) -> None:
    """200 steps, fifty kills at random moments."""
    batch = 16 if importance else BATCH
    settings = IMPORTANCE if importance else []
    arguments = [*command, *settings, f"engine.zero_stage={stage}", *budget(200 * batch, 6 * batch, 18 * batch)]
    tally = kill_at_random(arguments, tmp_path, random.Random(100 + stage), 50, warm_up=importance)
    print(f"\nsoak, ZeRO {stage}{', importance sampling' if importance else ''}: {tally}")
    assert tally.kills.total() >= 50


# ---- on another layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, 2), (1, 1)),
        ((1, 1), (2, 2)),
        *(pytest.param(*layouts, marks=pytest.mark.prove) for layouts in [((2, 2), (3, 2)), ((3, 2), (2, 2)),
                                                                      ((1, 2), (3, 2)), ((1, 1), (3, 2))]),
    ],
)  # fmt: skip
def test_fifty_steps_on_another_layout(
    command: list[str], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Layouts are (ZeRO stage, processes): the same inputs to the bit, losses within 1e-4."""
    moved_at, end = 10 * BATCH, 60 * BATCH
    arguments = [*command, f"train.log_every_images={BATCH}", *budget(end, moved_at, end)]
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    whole = train_straight([*arguments, f"engine.zero_stage={before[0]}"], straight, before[1])
    shutil.copytree(straight / f"checkpoints/{moved_at:012d}", moved / f"checkpoints/{moved_at:012d}")
    run = KilledRun([*arguments, f"engine.zero_stage={after[0]}"], moved, Tally(), world_size=after[1])
    life = run.finish()
    expected = {nimg: digests for nimg, digests in inputs_seen(whole).items() if nimg >= moved_at}
    assert len(expected) == 50
    assert all(len(set(digests)) == BATCH for digests in expected.values())
    assert inputs_seen(life) == expected
    losses, expected_losses = (
        {n: v["train/loss"] for n, v in logged(f).items() if n > moved_at} for f in (moved, straight)
    )
    assert len(expected_losses) == 50
    assert losses.keys() == expected_losses.keys()
    assert all(losses[n] == pytest.approx(expected_losses[n], rel=1e-4) for n in losses)
    assert newest_checkpoint(moved) is not None
