"""When a run stops, logs, saves and exports: budgets of images or FLOPs, moved up to the end of a step."""

from __future__ import annotations

from pathlib import Path

from trainer.config.run import load_config
from trainer.milestones import Milestones
from trainer.models import ModelCost

COST = ModelCost(num_params=1, forward_flops=100.0)  # 300 training FLOPs an image


def test_a_budget_of_flops_becomes_images(tiny_config: Path) -> None:
    plan = Milestones.create(load_config(tiny_config, ["train.budget_flops=9000"]), COST)  # 30 images: 4 steps of 8
    assert plan.total == 32
    assert plan.exports == {24, 32}


def test_moments_are_moved_up_to_the_end_of_a_step(tiny_config: Path) -> None:
    overrides = ["train.budget_images=41", "train.export_images=[1,17,500]", "train.log_every_images=5"]
    plan = Milestones.create(load_config(tiny_config, [*overrides, "train.checkpoint_every_images=15"]), COST)
    assert (plan.total, plan.log_every, plan.checkpoint_every) == (48, 8, 16)
    assert plan.exports == {8, 24, 48}  # 500 lies beyond the budget; the end is always exported
    assert [n for n in range(8, 49, 8) if plan.saves(n)] == [8, 16, 24, 32, 48]


def test_snapshots_of_averages_are_made_from_checkpoints(tiny_config: Path) -> None:
    overrides = ["train.ema_profiles=[0.1]", "train.ema_snapshot_every_images=15", "train.budget_images=40"]
    plan = Milestones.create(load_config(tiny_config, [*overrides, "train.export_images=[]"]), COST)
    assert [n for n in range(8, 41, 8) if plan.snapshots(n)] == [16, 32, 40]
    assert [n for n in range(8, 41, 8) if plan.saves(n)] == [16, 32, 40]
    assert plan.all_snapshots == plan.all_saves == {16, 32, 40}
