"""The training stream: the same global batches, however they are divided and whoever reads them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset import ShardDataset
from data_pipeline.fingerprint import sample_digest
from data_pipeline.stream import TrainStream


def stream(folder: Path, num_threads: int = 1, seed: int = 7) -> TrainStream:
    return TrainStream(ShardDataset(folder), seed=seed, random_flip=True, num_threads=num_threads, window=64)


def rank_part(folder: Path, rank: int, world_size: int, first_step: int, num_steps: int) -> list[bytes]:
    """What one process of several sees of global batches of 12: its sub-slices, one after the other."""
    own = stream(folder)
    share = 12 // world_size
    return [own.batch(step * 12 + rank * share, share).images.tobytes() for step in range(first_step, num_steps)]


def test_an_epoch_holds_every_sample_once(prepared: Path, dataset: ShardDataset) -> None:
    plain = TrainStream(dataset, seed=0, random_flip=False, window=64)
    batch = plain.batch(len(dataset) * 4, len(dataset))
    found = sorted(sample_digest(x.transpose(1, 2, 0), int(y)) for x, y in zip(batch.images, batch.labels, strict=True))
    images, labels = dataset.read(np.arange(len(dataset)))
    assert found == sorted(sample_digest(x.transpose(1, 2, 0), int(y)) for x, y in zip(images, labels, strict=True))


@given(start=st.integers(0, 2000), counts=st.lists(st.integers(0, 40), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_division_gives_the_same_images(dataset: ShardDataset, start: int, counts: list[int]) -> None:
    whole = TrainStream(dataset, seed=7, random_flip=True).batch(start, sum(counts))
    images, labels = [], []
    for count in counts:
        part = TrainStream(dataset, seed=7, random_flip=True).batch(start, count)
        images.append(part.images)
        labels.append(part.labels)
        start += count
    np.testing.assert_array_equal(np.concatenate(images), whole.images)
    np.testing.assert_array_equal(np.concatenate(labels), whole.labels)


def test_threads_change_nothing(prepared: Path) -> None:
    one, four = stream(prepared / "train"), stream(prepared / "train", num_threads=4)
    for start, count in ((0, 64), (190, 30), (1000, 3)):
        np.testing.assert_array_equal(one.batch(start, count).images, four.batch(start, count).images)
        np.testing.assert_array_equal(one.batch(start, count).labels, four.batch(start, count).labels)
    four.close()


def test_one_stream_may_be_read_by_many_threads(prepared: Path) -> None:
    shared = stream(prepared / "train")
    starts = list(range(0, 2000, 50))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda start: shared.batch(start, 50).images, starts))
    for start, images in zip(starts, together, strict=True):
        np.testing.assert_array_equal(images, stream(prepared / "train").batch(start, 50).images)


def test_processes_see_the_parts_of_one_sequence(prepared: Path) -> None:
    folder, num_steps = prepared / "train", 40  # more than two epochs
    whole = rank_part(folder, 0, 1, 0, num_steps)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(rank_part, folder, rank, 2, 0, num_steps).result() for rank in range(2)]
        resumed = pool.submit(rank_part, folder, 3, 4, 25, num_steps).result()
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    quarter = 3 * 3 * 8 * 8
    assert resumed == [step[3 * quarter :] for step in whole[25:]]


def test_flips_mirror_half_of_the_images(dataset: ShardDataset) -> None:
    plain = TrainStream(dataset, seed=7, random_flip=False).batch(0, 1000).images
    flipped = TrainStream(dataset, seed=7, random_flip=True).batch(0, 1000).images
    same = (plain == flipped).all(axis=(1, 2, 3))
    mirrored = (plain == flipped[:, :, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | mirrored).all()
    assert 420 < mirrored.sum() < 580  # 500 +- 5 standard errors


def test_another_epoch_flips_other_images(dataset: ShardDataset) -> None:
    random = TrainStream(dataset, seed=7, random_flip=True)
    seen = set()
    for epoch in range(6):
        start = epoch * len(dataset)
        row = int(np.flatnonzero(random.order.samples(start, len(dataset)) == 11)[0])
        seen.add(random.batch(start + row, 1).images.tobytes())
    assert len(seen) == 2  # sample 11 both ways round


def test_seeds_give_other_sequences(prepared: Path) -> None:
    first, second = (stream(prepared / "train", seed=seed).batch(0, 50).images for seed in (0, 1))
    assert (first != second).any()
