"""Damaged samples: found in every encoding, named, and replaced without moving anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset import DamagedSampleError, ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.index import Index
from data_pipeline.stream import TrainStream

DAMAGED = [3, 17, 60, 150]


@pytest.fixture(params=["png", "npy"])
def split(request: pytest.FixtureRequest, prepared: Path, small_npy: Path) -> Path:
    return (prepared if request.param == "png" else small_npy) / "train"


@pytest.fixture
def damaged(split: Path, tmp_path: Path) -> Path:
    """A copy with one bit flipped in the images of `DAMAGED`."""
    copy = Path(shutil.copytree(split, tmp_path / "copy"))
    for sample in DAMAGED:
        flip(copy, sample)
    return copy


def flip(folder: Path, sample: int) -> None:
    data = ShardDataset(folder)
    path = folder / data.manifest.shards[int(data.index.shard[sample])].file
    content = bytearray(path.read_bytes())
    content[int(data.index.offset[sample] + data.index.size[sample] // 2)] ^= 4
    path.write_bytes(content)


def stream(folder: Path, num_threads: int = 1) -> TrainStream:
    dataset = ShardDataset(folder)
    return TrainStream(dataset, seed=7, random_flip=True, window=64, on_damage="replace", num_threads=num_threads)


def test_damage_is_told_beside_what_is_intact(split: Path, damaged: Path) -> None:
    everything = np.arange(203)
    read, whole = ShardDataset(damaged).read_all(everything), ShardDataset(split).read_all(everything)
    assert sorted(read.damaged) == DAMAGED
    assert not whole.damaged
    intact = np.setdiff1d(everything, DAMAGED)
    np.testing.assert_array_equal(read.images[intact], whole.images[intact])
    np.testing.assert_array_equal(read.labels, whole.labels)
    assert "sample 000000017 is damaged" in str(read.damaged[17])


@pytest.mark.parametrize("keep", [0, 60, 600])
def test_a_shard_that_shrank_while_it_was_used_is_damage(split: Path, tmp_path: Path, keep: int) -> None:
    copy = Path(shutil.copytree(split, tmp_path / "copy"))
    data = ShardDataset(copy)
    (copy / data.manifest.shards[0].file).write_bytes((copy / data.manifest.shards[0].file).read_bytes()[:keep])
    with pytest.raises(DamagedSampleError, match="do not match their checksum"):
        data.read(np.array([0]))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_substitutes_are_the_same_for_everybody_and_nothing_else_moves(
    split: Path, damaged: Path, num_threads: int
) -> None:
    epoch = stream(damaged, num_threads).batch(0, 203)
    intact = TrainStream(ShardDataset(split), seed=7, random_flip=True, window=64).batch(0, 203)
    replaced = np.isin(intact.samples, DAMAGED)
    assert sorted(epoch.damaged) == DAMAGED
    assert "000000003 is damaged" in epoch.damaged[3]
    np.testing.assert_array_equal(epoch.images[~replaced], intact.images[~replaced])
    np.testing.assert_array_equal(epoch.samples[~replaced], intact.samples[~replaced])
    assert not np.isin(epoch.samples, DAMAGED).any()
    # The substitute is another sample with its own label, under the flip of the place that it takes.
    dataset = ShardDataset(split)
    for row in np.flatnonzero(replaced):
        (image,), (label,) = dataset.read(epoch.samples[row : row + 1])
        np.testing.assert_array_equal(epoch.images[row], image[:, :, ::-1] if epoch.flipped[row] else image)
        assert epoch.labels[row] == label
    # Another division of the same images, in another process's stream.
    parts = [stream(damaged).batch(start, 29) for start in range(0, 203, 29)]
    np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), epoch.images)
    np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), epoch.samples)


def test_the_default_is_to_stop(damaged: Path) -> None:
    with pytest.raises(DamagedSampleError, match=r"sample 0000000\d\d|sample 000000150"):
        TrainStream(ShardDataset(damaged), seed=7, random_flip=False).batch(0, 203)


def test_nothing_is_left_to_take_its_place(split: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(split, tmp_path / "copy"))
    data = ShardDataset(copy)
    index = Index(**(vars(data.index) | {"crc32": data.index.crc32 ^ np.uint32(1)}))
    object.__setattr__(data, "index", index)
    with pytest.raises(DataError, match="None of 100 other samples can be read in its place"):
        TrainStream(data, seed=7, random_flip=False, on_damage="replace").batch(0, 1)
