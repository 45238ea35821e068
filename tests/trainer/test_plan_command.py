"""`python -m trainer.plan`: what a run will do and need, before it is started."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, UserError
from trainer import plan as plan_module
from trainer.config.run import load_config
from trainer.memory import memory_of
from trainer.milestones import Milestones
from trainer.models import count
from trainer.plan import choices, disk_of, main, plan_text

ASSUMED = {"mfu": 0.5, "peak": 1e12, "limit": 1e9, "device": "cuda"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["plan", *map(str, arguments)])
    main()


def test_the_plan_says_what_the_run_will_do(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    cost = count(config.model, config.diffusion)
    text = plan_text(config, 2, **ASSUMED)  # type: ignore[arg-type]
    assert f"{cost.num_params:,} parameters" in text
    assert "48 images in 6 steps of 8" in text
    assert "on 2 processes, each of which computes 1 x 4 images a step" in text
    without_limit = plan_text(config, 2, **(ASSUMED | {"limit": None}))  # type: ignore[arg-type]
    assert max(map(len, [*text.splitlines(), *without_limit.splitlines()])) <= 110


def test_the_runs_own_choice_is_marked_once(tiny_config: Path) -> None:
    for engine in ({}, {"zero_stage": 0}, {"zero_stage": 3, "offload_optimizer": True, "precision": "fp16"}):
        config = load_config(tiny_config, [f"engine.{key}={value}" for key, value in engine.items()])
        rows = choices(config, 2, limit=None, device="cuda")
        own = [row for row in rows if row.own]
        assert len(own) == 1
        assert own[0].memory == memory_of(config, 2)
        assert (own[0].zero_stage, own[0].precision) == (config.engine.zero_stage, config.engine.precision)
        assert {row.zero_stage for row in rows} == {0, 1, 2, 3}
        assert len({(r.zero_stage, r.checkpointing, r.precision, r.offload) for r in rows}) == len(rows)


def test_the_largest_micro_batch_fits_and_the_next_does_not(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    limit = memory_of(config, 1, micro_batch=2).total
    own = next(row for row in choices(config, 1, limit=limit, device="cuda") if row.own)
    assert own.largest_micro_batch == 2
    none = next(row for row in choices(config, 1, limit=1.0, device="cuda") if row.own)
    assert none.largest_micro_batch is None


def test_disk_space_of_exports_and_kept_checkpoints(tiny_config: Path) -> None:
    overrides = [
        "train.budget_images=80", "train.export_images=[16]", "train.checkpoint_every_images=8",
        "train.keep_checkpoints=2", "train.keep_every_images=32", "train.extra_ema_decays=[0.8]",
    ]  # fmt: skip
    config = load_config(tiny_config, overrides)
    cost = count(config.model, config.diffusion)
    disk = disk_of(config, Milestones.create(config, cost), cost)
    assert disk.export == 4 * 3 * cost.num_params  # weights and two averages
    assert disk.checkpoint == 4 * 5 * cost.num_params  # and two moments
    assert (disk.num_exports, disk.num_saves) == (2, 10)
    assert disk.num_kept == 4  # 32 and 64 for good, 72 and 80 as the newest

    off = ["train.checkpoint_every_images=16", "train.keep_every_images=25", "train.keep_checkpoints=1"]
    config = load_config(tiny_config, [*overrides, *off])
    assert disk_of(config, Milestones.create(config, cost), cost).num_kept == 3  # 32 from 25 on, 64 from 50 on, and 80


def test_disk_space_of_snapshots(tiny_config: Path) -> None:
    overrides = ["train.ema_profiles=[0.05,0.1]", "train.ema_snapshot_every_images=16", "train.keep_checkpoints=1"]
    config = load_config(tiny_config, overrides)
    cost = count(config.model, config.diffusion)
    disk = disk_of(config, Milestones.create(config, cost), cost)
    assert (disk.snapshot, disk.num_snapshots) == (4 * 2 * cost.num_params, 3)  # at 16, 32 and 48
    assert disk.num_saves == 4  # and at the export of 24
    assert disk.peak == 2 * disk.export + 2 * disk.checkpoint + 3 * disk.snapshot
    text = plan_text(config, 2, **ASSUMED)  # type: ignore[arg-type]
    assert re.search(r"snapshots +3, of power_0\.05, power_0\.1: .* each, every 16 images and at the end", text)
    half = load_config(tiny_config, [*overrides, "train.ema_snapshot_precision=fp16"])
    assert disk_of(half, Milestones.create(half, cost), cost).snapshot == disk.snapshot / 2


def test_json_has_the_same_figures(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--config", tiny_config, "--processes", 2, "--device-memory", 1, "--json", "engine.zero_stage=2")
    found = json.loads(capsys.readouterr().out)
    config = load_config(tiny_config, ["engine.zero_stage=2"])
    own = next(row for row in found["memory"] if row["own"])
    assert own["total"] == memory_of(config, 2).total
    assert own["largest_micro_batch"] == 4
    assert found["assumed"]["device_memory"] == 1e9 * plan_module.USABLE
    assert found["device_seconds"] == pytest.approx(found["flops"] / (0.3 * 989e12))


@pytest.mark.parametrize(
    "arguments", [["--processes", 0], ["--mfu", 1.5], ["--peak", -1], ["--device-memory", 0]], ids=str
)
def test_impossible_options_are_refused(
    tiny_config: Path, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"{arguments[0]} {arguments[1]}"):
        run(monkeypatch, "--config", tiny_config, *arguments)


def test_processes_must_divide_the_batch(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be divided among 3"):
        run(monkeypatch, "--config", tiny_config, "--processes", 3)


def test_deepspeeds_own_settings_may_say_auto(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size"
    command = ("--config", tiny_config, "--processes", 2, "engine.zero_stage=3")
    run(monkeypatch, *command)
    plain = capsys.readouterr().out
    run(monkeypatch, *command, f"{key}=auto")
    assert capsys.readouterr().out == plain
    with pytest.raises(ConfigError, match="stage3_prefetch_bucket_size='many'"):
        run(monkeypatch, *command, f"{key}=many")
