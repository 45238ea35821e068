"""Checkpoints under damage: what is incomplete or altered is never resumed from, and nothing valid is lost."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks, start_ranks

from data_pipeline.errors import UserError
from trainer import checkpoint as checkpoints
from trainer.checkpoint import (
    CheckpointReader,
    Snapshot,
    list_checkpoints,
    newest_valid,
    remove_old,
    verify,
    write_checkpoint,
)
from trainer.export import open_export


@pytest.fixture(scope="module")
def finished_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 48 images with checkpoints and exports at 24 and 48."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_ranks(["trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}"], 1)
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_checkpoints_are_complete_and_hold_no_pickle(run: Path) -> None:
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["000000000048", "000000000024"]
    for path in list_checkpoints(run / "checkpoints"):
        assert verify(path) is None
        assert {p.suffix for p in path.iterdir()} <= {".json", ".yaml", ".safetensors"}
        assert CheckpointReader(path).state.nimg == int(path.name)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: flip_a_byte(c / "rank-00000.safetensors"), "checksum"),
        (lambda c: (c / "state.json").unlink(), "state.json is missing"),
        (lambda c: (c / "manifest.json").unlink(), "no manifest"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest is damaged"),
        (lambda c: (c / "config.yaml").write_text("short"), "bytes"),
    ],
    ids=["flipped", "lost-file", "no-manifest", "broken-manifest", "truncated"],
)
def test_a_damaged_newest_is_named_and_the_one_before_it_used(run: Path, damage: object, said: str) -> None:
    damage(run / "checkpoints" / "000000000048")  # type: ignore[operator]
    path, skipped = newest_valid(run / "checkpoints")
    assert path == run / "checkpoints" / "000000000024"
    assert len(skipped) == 1
    assert "000000000048" in skipped[0]
    assert said in skipped[0]


def test_all_damaged_is_refused_not_started_afresh(run: Path) -> None:
    for path in list_checkpoints(run / "checkpoints"):
        flip_a_byte(path / "rank-00000.safetensors")
    with pytest.raises(UserError, match="none of the checkpoints"):
        newest_valid(run / "checkpoints")


def test_a_run_whose_checkpoints_are_gone_is_not_started_afresh(run: Path, tiny_config: Path) -> None:
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    metrics = (run / "metrics.0.jsonl").read_bytes()
    done = start_ranks(["trainer/run.py", "--config", str(tiny_config), f"run.folder={run}"], 1)[0]
    text = done.communicate(timeout=120)[0]
    assert done.returncode == 2
    assert "holds no checkpoint, but the run had one at 48 images" in text
    assert (run / "metrics.0.jsonl").read_bytes() == metrics


def test_a_half_written_folder_is_not_a_checkpoint(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "000000000024", run / "checkpoints" / ".000000000096.tmp")
    assert newest_valid(run / "checkpoints")[0] == run / "checkpoints" / "000000000048"


def test_resume_after_damage_ends_at_the_same_weights(finished_run: Path, run: Path, tiny_config: Path) -> None:
    (run / "result.json").unlink()
    shutil.rmtree(run / "exports" / "000000000048")
    flip_a_byte(run / "checkpoints" / "000000000048" / "rank-00000.safetensors")
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={run}", "train.keep_checkpoints=1"]
    text = run_ranks(command, 1)
    assert "skipped checkpoint 000000000048" in text
    # The damaged one must not count among those that are kept, or the good ones would be removed.
    kept = list_checkpoints(run / "checkpoints")
    assert [p.name for p in kept] == ["000000000048"]
    assert verify(kept[0]) is None
    assert (run / "checkpoints" / "000000000048.damaged").is_dir()
    assert "resuming at 24 images" in text
    hashes = [open_export(r / "exports" / "000000000048").weights_sha256 for r in (run, finished_run)]
    assert hashes[0] == hashes[1]


def test_an_export_lost_after_its_checkpoint_is_made_again(finished_run: Path, run: Path, tiny_config: Path) -> None:
    (run / "result.json").unlink()
    (run / "checkpoints" / ".000000000056.tmp").mkdir()  # and one that an earlier life began
    shutil.rmtree(run / "exports" / "000000000048")
    run_ranks(["trainer/run.py", "--config", str(tiny_config), f"run.folder={run}"], 1)
    ours, theirs = (open_export(r / "exports" / "000000000048") for r in (run, finished_run))
    assert ours.weights_sha256 == theirs.weights_sha256


class Alone:
    rank = 0

    @staticmethod
    def gather_objects(value: object) -> list[object]:
        return [value]


@pytest.mark.parametrize("where", ["write_mapping", "write_json"])
def test_a_full_disk_keeps_the_old_checkpoints(run: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, where, full)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    state = CheckpointReader(run / "checkpoints" / "000000000048").state
    with pytest.raises(UserError, match=r"disk is full.*nothing earlier was lost"):
        write_checkpoint(run / "checkpoints", Snapshot(state, {}, {}, {}, ""), Alone())  # type: ignore[arg-type]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before
    assert newest_valid(run / "checkpoints")[0] is not None


def test_the_newest_are_kept_and_the_multiples(tmp_path: Path) -> None:
    for nimg in (32, 64, 96, 128, 160, 200, 224, 256, 288, 320, 352):  # saves need not fall on the multiples
        (tmp_path / f"{nimg:012d}").mkdir()
        remove_old(tmp_path, 2, every=100)
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [352, 320, 200, 128]
    remove_old(tmp_path, 1)
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [352]


def test_a_damaged_export_is_refused(run: Path) -> None:
    export = run / "exports" / "000000000048"
    flip_a_byte(export / "ema.safetensors")
    with pytest.raises(UserError, match=r"damaged.*ema\.safetensors"):
        open_export(export)
    with pytest.raises(UserError, match="not an export"):
        open_export(run)


def test_reading_another_networks_checkpoint_is_refused(run: Path) -> None:
    reader = CheckpointReader(run / "checkpoints" / "000000000048")
    name, shape = next(iter(reader.shapes.items()))
    reader.shapes[name] = (*shape, 2)
    with pytest.raises(UserError, match="another network"):
        reader.whole("weight", name)


def test_result_names_what_was_reached(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["nimg"]) == ("complete", 48)
    assert (run / result["export"] / "export.json").exists()
