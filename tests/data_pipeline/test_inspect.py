"""`inspect`: says what is there, finds every damage, draws samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.inspect import main


def test_summary_and_verification(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prepared), "--verify"]) == 0  # both splits
    told = capsys.readouterr().out
    assert "203 of 8x8, png" in told
    assert "verified: all 203 images" in told
    assert "verified: all 20 images" in told
    assert "texture 2: 67" in told


@pytest.mark.parametrize(("place", "problems"), [("payload", 2), ("header", 1)])
def test_damage_is_found_and_named(own_copy: Path, place: str, problems: int) -> None:
    data = ShardDataset(own_copy / "train")
    path = own_copy / "train" / data.manifest.shards[1].file
    content = bytearray(path.read_bytes())
    row = int(np.flatnonzero(data.index.shard == 1)[2])
    content[data.index.offset[row] + (30 if place == "payload" else -500)] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{problems} problems:\n  .*000001.tar: sha256 is \w+, expected \w+") as found:
        main([str(own_copy / "train"), "--verify"])
    assert (f"sample {row:09d} is damaged" in str(found.value)) == (place == "payload")


def test_swapped_labels_are_found_by_the_fingerprint(own_copy: Path) -> None:
    """Even where every checksum was made to fit."""
    path = own_copy / "train/manifest.json"
    text = path.read_text()
    fingerprint = ShardDataset(own_copy / "train").manifest.fingerprint
    path.write_text(text.replace(fingerprint, fingerprint[::-1]))
    with pytest.raises(DataError, match="not those of the manifest's fingerprint"):
        main([str(own_copy / "train"), "--verify"])


def test_grid_shows_one_class_a_row(prepared: Path, tmp_path: Path) -> None:
    main([str(prepared / "train"), "--grid", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (3 * 10 + 2, 16 * 10 + 2, 3)
    data = ShardDataset(prepared / "train")
    images, labels = data.read(np.arange(len(data)))
    for row in range(3):
        cell = pixels[2 + row * 10 : 10 + row * 10, 2:10]
        match = (images == cell.transpose(2, 0, 1)).all(axis=(1, 2, 3))
        assert labels[match].tolist() == [row]


def test_grid_of_several_splits_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--grid draws one split: name one of .*test, .*train"):
        main([str(prepared), "--grid", str(tmp_path / "grid.png")])
