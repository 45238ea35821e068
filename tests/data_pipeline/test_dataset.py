"""Reading: what was written comes back; anything missing or damaged is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline import dataset as dataset_module
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.sources.generated import Generated


def test_reads_what_the_source_made(small_source: Generated, dataset: ShardDataset) -> None:
    split = small_source.open(Path()).splits["train"]
    chosen = np.array([202, 0, 7, 7, 100])
    images, labels = dataset.read(chosen)
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    for sample, image, label in zip(chosen.tolist(), images, labels.tolist(), strict=True):
        expected, expected_label = split.load(sample)
        np.testing.assert_array_equal(image, expected.transpose(2, 0, 1))
        assert label == expected_label


@pytest.mark.parametrize("num_open", [0, 1])
def test_reads_with_fewer_open_files_than_shards(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, num_open: int
) -> None:
    monkeypatch.setattr(dataset_module, "MAX_OPEN_SHARDS", num_open)
    narrow = ShardDataset(prepared / "train")
    everything = np.arange(len(narrow))
    forward, backward = narrow.read(everything)[0], narrow.read(everything[::-1])[0]
    np.testing.assert_array_equal(forward, backward[::-1])


def test_missing_shard_is_refused_at_the_start(own_copy: Path) -> None:
    (own_copy / "train/shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard .*000001.tar is missing\. Remove .*copy and make it anew: python -m"):
        ShardDataset(own_copy / "train")


def test_truncated_shard_is_refused_at_the_start(own_copy: Path) -> None:
    path = own_copy / "train/shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1024])
    with pytest.raises(DataError, match=rf"000000.tar has {len(content) - 1024:,} bytes instead of {len(content):,}"):
        ShardDataset(own_copy / "train")


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_damaged_index_is_refused_at_the_start(own_copy: Path, damage: str) -> None:
    path = own_copy / "train/index.npz"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content)
    with pytest.raises(DataError, match=r"index.npz is (missing|damaged)"):
        ShardDataset(own_copy / "train")


def test_flipped_bit_is_found_when_its_sample_is_read(own_copy: Path) -> None:
    data = ShardDataset(own_copy / "train")
    path = own_copy / "train" / data.manifest.shards[0].file
    content = bytearray(path.read_bytes())
    content[data.index.offset[3] + 50] ^= 4
    path.write_bytes(content)
    data.read(np.array([2, 4]))  # its neighbours are fine
    with pytest.raises(
        DataError,
        match=r"000000.tar: sample 000000003 is damaged: its bytes do not match their checksum.*inspect .* --verify",
    ):
        data.read(np.array([2, 3]))


def test_image_of_another_size_is_refused(own_copy: Path) -> None:
    path = own_copy / "train/manifest.json"
    path.write_text(path.read_text().replace('"image_size": 8', '"image_size": 16'))
    with pytest.raises(DataError, match=r"it is 8x8, the manifest says 16x16"):
        ShardDataset(own_copy / "train").read(np.array([0]))
