"""What the benchmarks of the data pipeline report, where the answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_throughput
from benchmarks.data_throughput import Case, contestants, race, read_payloads, summary
from benchmarks.imagenet_scale import requests, start, write_hollow_split
from benchmarks.shuffle_quality import measure, shards_at_hand, webdataset_order
from benchmarks.splits import Images, photographs, write_split
from benchmarks.streaming_peer import StreamingPeer
from data_pipeline import codec
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from data_pipeline.stream import TrainStream


def a_case(encoding: codec.Encoding) -> Case:
    def encode(image: Images) -> bytes:
        return codec.encode(image, "png" if encoding == "any" else encoding)

    return Case(16, 128, encoding, "npy" if encoding == "npy" else "png", encode)


def written(case: Case, folder: Path) -> tuple[ShardDataset, Images]:
    images, labels = photographs(None, case.num, case.size)
    split = write_split(
        folder, images, labels, case.encode, case.encoding, extension=case.extension, num_shards=4
    )  # fmt: skip
    return split, images


@pytest.mark.parametrize("encoding", ["png", "npy", "any"])
def test_all_contestants_run_over_the_same_images(encoding: codec.Encoding, tmp_path: Path) -> None:
    case = a_case(encoding)
    dataset, images = written(case, tmp_path / "train")
    order = TrainStream(dataset, seed=data_throughput.SEED, random_flip=False).order.epoch(0)
    assert read_payloads(dataset, order) == [case.encode(image) for image in images[order]]
    seconds = race(contestants(dataset, case, None), rounds=1)
    limits = {"bare read"} if encoding == "npy" else {"bare decode", "bare Pillow"}
    assert set(seconds) == {"ours", "ours, flips", "step inputs", "webdataset"} | limits


def test_ratios_are_those_of_neighbours() -> None:
    """A machine that is three times slower in one round changes no ratio."""
    rounds = {"ours": [2.0, 6.0, 2.0], "bare decode": [1.0, 3.0, 1.0], "webdataset": [8.0, 24.0, 8.0]}
    row = summary("a case", 128, 0.5, rounds, {})
    assert (row.limit, row.share_of_limit, row.times_faster) == ("bare decode", 0.5, {"webdataset": 4.0})
    assert row.microseconds["ours"] == 2e6


def test_mosaics_are_made_of_the_images(tmp_path: Path) -> None:
    dataset, images = written(a_case("png"), tmp_path / "train")
    mosaics, _ = photographs(Path(dataset.place), 2, 32)
    assert np.array_equal(mosaics[1, :16, 16:], images[5])
    enlarged, _ = photographs(Path(dataset.place), 1, 96)
    assert abs(enlarged[0, :32, :32].mean() - images[0].mean()) < 2


def test_an_unshuffled_epoch_is_told_from_a_shuffled_one() -> None:
    num, num_classes, num_shards = 4096, 4, 8
    shard, label = np.arange(num) // (num // num_shards), np.arange(num) // (num // num_classes)
    sorted_one = measure("sorted", np.arange(num), shard, label)
    assert sorted_one.spearman[1] == pytest.approx(1)
    assert (sorted_one.displacement, sorted_one.classes, sorted_one.shards_at_hand) == (0, 1, 1)
    assert sorted_one.same_shard == pytest.approx(1 - (num_shards - 1) / (num - 1))
    assert sorted_one.chi_square == pytest.approx(data_throughput.BATCH)  # all of one class: B (K - 1) / (K - 1)
    mixed = measure("mixed", np.random.default_rng(0).permutation(num), shard, label)
    assert abs(mixed.spearman[1]) < 4 / num**0.5
    assert mixed.chi_square == pytest.approx(1, abs=0.6)
    assert mixed.shards_at_hand == num_shards


def test_shards_at_hand() -> None:
    assert shards_at_hand(np.array([0, 0, 1, 1, 2, 2])) == 1
    assert shards_at_hand(np.array([0, 1, 0, 2, 1, 2])) == 2
    assert shards_at_hand(np.array([0, 1, 2, 0, 1, 2])) == 3


def test_the_peer_s_order_is_that_of_its_pipeline(tmp_path: Path) -> None:
    import webdataset

    dataset, _ = written(a_case("npy"), tmp_path / "train")
    shards = sorted(str(path) for path in tmp_path.glob("train/*.tar"))
    pipeline = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(20, seed=0)
    sizes = np.bincount(dataset.index.shard)
    assert [int(sample["__key__"]) for sample in pipeline] == webdataset_order(sizes, 20).tolist()


def test_a_hollow_split_is_a_split(tmp_path: Path) -> None:
    write_hollow_split(tmp_path / "train", num_shards=7, num_samples=1000)
    dataset, stream, _ = start(tmp_path / "train")
    assert len(dataset) == 1000
    assert np.bincount(dataset.index.shard).tolist() == [142, 143, 143, 143, 143, 143, 143]
    assert requests(dataset, stream) == int(dataset.index.size.sum())
    last = dataset.index.offset + dataset.index.size
    for number, shard in enumerate(dataset.manifest.shards):
        assert last[dataset.index.shard == number].max() <= shard.num_bytes


@pytest.mark.parametrize("python", ["no/such/python", sys.executable])
def test_a_missing_peer_is_said(python: str) -> None:
    with pytest.raises(UserError, match=f"--streaming-python {python}.*how to make an environment"):
        StreamingPeer(Path(python))
