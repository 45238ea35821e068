"""`python -m trainer.posthoc_ema`: from a run's snapshots to an export of averages that nobody tracked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from data_pipeline.errors import UserError
from trainer import posthoc_ema
from trainer.averages.rules import PowerProfile
from trainer.checkpoint import CheckpointReader, list_checkpoints
from trainer.export import open_export, write_export
from trainer.mirror_files import parts_of
from trainer.posthoc_ema import main, open_snapshots, reconstruct

END = "000000000048"
EVERY_STEP = ["train.ema_profiles=[0.05,0.1]", "train.ema_snapshot_every_images=8", "train.keep_checkpoints=1"]


def train_tiny(config: Path, runs: dict[Path, list[str]]) -> None:
    spec = next(iter(runs)).parent / "spec.json"
    scenarios = [[f"run.folder={folder}", *EVERY_STEP, *overrides] for folder, overrides in runs.items()]
    spec.write_text(json.dumps({"config": str(config), "runs": scenarios}))
    run_ranks(["tests/trainer/train_scenarios.py", str(spec)], 1)


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; one in half precision; one that dies at 24 images, its checkpoint written and its snapshot not."""
    base = tmp_path_factory.mktemp("posthoc")
    half = ["train.ema_snapshot_precision=fp16"]
    train_tiny(tiny_config, {base / "run": [], base / "half": half, base / "died": ["train.budget_images=24"]})
    shutil.rmtree(base / "died" / "ema_snapshots" / "000000000024")
    (base / "died" / "ema_snapshots" / ".000000000024.tmp").mkdir()
    train_tiny(tiny_config, {base / "died": []})
    return base


@pytest.fixture
def run(runs: Path) -> Path:
    return runs / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["posthoc_ema", *map(str, arguments)])
    main()


def test_snapshots_are_the_checkpoints_averages_and_outlive_them(run: Path) -> None:
    snapshots = open_snapshots(run)
    assert [s.step for s in snapshots.stored] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    [last] = list_checkpoints(run / "checkpoints")  # the others are gone
    for name in ("power_0.05", "power_0.1"):
        kept = open_export(run / "ema_snapshots" / END).tensors(name)
        assert all(torch.equal(kept[key], t) for key, t in CheckpointReader(last).weights(name))
    assert open_export(run / "ema_snapshots" / END).weights_sha256.keys() == {"power_0.05", "power_0.1"}


def test_the_export_holds_the_fitted_sums(run: Path, tmp_path: Path) -> None:
    snapshots, wanted = open_snapshots(run), {"power_0.07": PowerProfile(0.07), "power_0.1": PowerProfile(0.1)}
    fits = reconstruct(snapshots, wanted, tmp_path / "out")
    made = open_export(tmp_path / "out")
    assert made.network("power_0.07") is not None
    files = [load_file(path) for path in snapshots.files]
    for key, tensor in made.tensors("power_0.07").items():
        parts = zip(fits["power_0.07"].factors, files, strict=True)
        expected = sum(factor * file[key].double() for factor, file in parts)
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-9)
    tracked = open_export(run / "exports" / END).tensors("power_0.1")
    assert all(torch.allclose(t, tracked[key], rtol=1e-5, atol=1e-7) for key, t in made.tensors("power_0.1").items())
    said = {name: {"profile_error": fit.error, "num_snapshots": 6} for name, fit in fits.items()}
    assert made.info == open_export(run / "exports" / END).info | {"reconstructed": said}


def test_the_command_adds_to_what_is_there(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, copied, "--sigma-rel", 0.06, 0.08)
    out = copied / "posthoc_ema" / END
    first = open_export(out).weights_sha256
    command(monkeypatch, copied, "--sigma-rel", 0.07, "--ema-decay", 0.5, "--max-error", 0.9)
    assert str(out) in capsys.readouterr().out
    after = open_export(out).weights_sha256
    assert list(after) == ["power_0.06", "power_0.08", "power_0.07", "ema_0.5"]
    assert first.items() <= after.items()
    assert [*open_export(out).info["reconstructed"]] == list(after)
    assert open_export(out).reconstruction("ema_0.5")["num_snapshots"] == 6
    command(monkeypatch, copied, "--sigma-rel", 0.07, "--at", 24)
    assert open_export(copied / "posthoc_ema" / "000000000024").info["nimg"] == 24
    with pytest.raises(UserError, match=r"another run's export, or of another moment"):
        command(monkeypatch, copied, "--sigma-rel", 0.07, "--at", 24, "--out", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sigma-rel", 0.01], r"too few.*power_0\.01 \(error 0\.\d+\).*--max-error.*ema_snapshot_every_images"),
        (["--sigma-rel", 0.29], r"--sigma-rel 0\.29.*below 0\.2887"),
        (["--ema-decay", 1], r"--ema-decay 1 must be"),
        ([], r"name the averages"),
        (["--sigma-rel", 0.07, "--at", 20], r"--at 20.*nearest ones are at 8, 16, 24, 32\."),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused(
    run: Path, arguments: list[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=said):
        command(monkeypatch, run, *arguments)
    assert not (run / "posthoc_ema").exists()


def test_a_damaged_snapshot_is_left_out(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "ema_snapshots" / "000000000024" / "power_0.1.safetensors").write_bytes(b"?")
    assert {s.step for s in open_snapshots(copied).stored} == {1, 2, 4, 5, 6}
    assert "snapshot 000000000024 is left out: power_0.1.safetensors has 1 bytes" in capsys.readouterr().out
    shutil.rmtree(copied / "ema_snapshots")
    with pytest.raises(UserError, match=r"holds no snapshots; train with train\.ema_profiles"):
        open_snapshots(copied)
    with pytest.raises(UserError, match=r"there is no run folder .*nowhere; name the one"):
        open_snapshots(copied / "nowhere")


def test_a_life_that_died_before_its_snapshot_is_made_good(runs: Path) -> None:
    straight, died = (runs / name / "ema_snapshots" for name in ("run", "died"))
    assert sorted(p.name for p in died.iterdir()) == sorted(p.name for p in straight.iterdir())
    for path in straight.iterdir():
        assert open_export(died / path.name).weights_sha256 == open_export(path).weights_sha256


def test_half_precision_takes_half_the_space_and_is_refused_where_it_would_overflow(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, half = runs / "run", runs / "half"
    whole, stored = (load_file(r / "ema_snapshots" / END / "power_0.1.safetensors") for r in (run, half))
    assert all(torch.equal(stored[key], t.half()) for key, t in whole.items())
    fits = reconstruct(open_snapshots(half), {"power_0.07": PowerProfile(0.07)}, tmp_path / "out")
    assert open_export(tmp_path / "out").tensors("power_0.07")[next(iter(whole))].dtype == torch.float32
    assert fits["power_0.07"].error < posthoc_ema.MAX_ERROR
    [checkpoint] = list_checkpoints(half / "checkpoints")
    monkeypatch.setattr(CheckpointReader, "whole", lambda *_: torch.tensor([7e4]))
    with pytest.raises(UserError, match=r"power_0\.1 .* holds 70000: too large.*fp16; use fp32"):
        write_export(checkpoint, tmp_path / "big", run_id="r", kinds=["power_0.1"], dtype=torch.float16)


def test_mirrors_take_both_folders_whole(run: Path) -> None:
    names = [f"{folder}/{END}/{file}" for folder in ("ema_snapshots", "posthoc_ema")
             for file in ("power_0.1.safetensors", "manifest.json")]  # fmt: skip
    assert parts_of(names)[""].complete == [f"ema_snapshots/{END}", f"posthoc_ema/{END}"]
    assert "power_0.1.safetensors" in json.loads((run / "ema_snapshots" / END / "manifest.json").read_text())["files"]
