"""`inspect`: says what is there, finds every damage, draws samples."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.inspect import main
from data_pipeline.verify import verify


def test_summary_and_verification(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prepared), "--verify"]) == 0  # both splits
    told = capsys.readouterr().out
    assert "203 of 8x8, png, 2" in told
    assert "verified: all 203 images" in told
    assert "verified: all 20 images" in told
    assert "texture 2: 67" in told


@pytest.mark.parametrize("num_processes", ["1", "2"])
def test_damage_is_found_and_named_shard_by_shard(own_copy: Path, num_processes: str) -> None:
    data = ShardDataset(own_copy / "train")
    damage(data, 1, [2, 5])
    damage(data, 2, [], header_of=3)
    with pytest.raises(DataError) as found:
        main([str(own_copy), "--verify", "--num-processes", num_processes])  # the other split is intact
    told = str(found.value)
    row = int(np.flatnonzero(data.index.shard == 1)[2])
    start = rf"^{re.escape(str(own_copy / 'train'))}: 2 problems:\n  "
    first = rf"\S+/shard-000001.tar: sha256 is \w+, expected \w+; 2 of {data.manifest.shards[1].num_samples} images"
    lines = rf" damaged:\n    sample {row:09d} is damaged: \D+\n    sample {row + 3:09d} is damaged: \D+\n  "
    assert re.match(start + first + lines + r"\S+/shard-000002.tar: sha256 is \w+, expected \w+\nRemove ", told)


def damage(data: ShardDataset, shard: int, samples: list[int], header_of: int | None = None) -> None:
    """Flip a bit of some images of a shard, or of a tar header."""
    path = Path(data.shard_place(shard))
    content = bytearray(path.read_bytes())
    offsets, sizes = (column[data.index.shard == shard] for column in (data.index.offset, data.index.size))
    for sample in samples:
        content[offsets[sample] + sizes[sample] - 20] ^= 1
    if header_of is not None:
        content[offsets[header_of] - 500] ^= 1
    path.write_bytes(content)


def test_other_encodings_are_verified_too(small_npy: Path, tmp_path: Path) -> None:
    data = ShardDataset(shutil.copytree(small_npy / "train", tmp_path / "copy"))
    assert verify(data) == []
    damage(data, 0, [7])
    (problem,) = verify(data)
    assert f"1 of {data.manifest.shards[0].num_samples} images damaged:\n    sample 000000007 is damaged" in problem


def test_shards_are_listed(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prepared / "train"), "--shards"]) == 0
    data = ShardDataset(prepared / "train")
    lines = capsys.readouterr().out.splitlines()[-len(data.manifest.shards) :]
    firsts = [int(np.flatnonzero(data.index.shard == number)[0]) for number in range(len(lines))]
    assert [line.split() for line in lines] == [
        [shard.file, str(shard.num_samples), str(first), f"{shard.num_bytes / 1e6:.1f}", shard.sha256[:16]]
        for shard, first in zip(data.manifest.shards, firsts, strict=True)
    ]


def test_the_same_as_json(prepared: Path, own_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prepared), "--json", "--shards", "--verify", "--num-processes", "1"]) == 0
    test, train = map(json.loads, capsys.readouterr().out.splitlines())
    data = ShardDataset(prepared / "train")
    assert (test["split"], test["num_samples"], train["split"], train["num_samples"]) == ("test", 20, "train", 203)
    assert train["labels"] == [68, 68, 67]
    assert train["bytes_per_image"] == round(float(data.index.size.mean()), 1)
    assert [shard["file"] for shard in train["shards"]] == [shard.file for shard in data.manifest.shards]
    assert train["problems"] == []
    damage(ShardDataset(own_copy / "test"), 0, [0])
    with pytest.raises(DataError, match="1 problems"):
        main([str(own_copy / "test"), "--json", "--verify", "--num-processes", "1"])
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1


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
