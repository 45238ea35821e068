"""The order of samples: every sample once per epoch, a function of (seed, epoch), nearly sequential."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import EpochOrder

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(lambda sizes: np.array(sizes, dtype=np.int64))


@given(sizes=shard_sizes, seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), window=st.integers(1, 2000))
def test_every_sample_exactly_once_per_epoch(sizes: np.ndarray, seed: int, epoch: int, window: int) -> None:
    order = EpochOrder(sizes, seed=seed, window=window)
    start = epoch * order.num_samples
    assert sorted(order.samples(start, order.num_samples).tolist()) == list(range(order.num_samples))


@given(sizes=shard_sizes, start=st.integers(0, 5000), cuts=st.lists(st.integers(0, 300), max_size=6))
@settings(max_examples=50)
def test_any_cut_gives_the_same_sequence(sizes: np.ndarray, start: int, cuts: list[int]) -> None:
    order = EpochOrder(sizes, seed=1, window=50)
    whole = order.samples(start, sum(cuts))
    parts = [np.empty(0, dtype=np.int64)]
    for cut in cuts:
        parts.append(EpochOrder(sizes, seed=1, window=50).samples(start, cut))  # a fresh one: no history is needed
        start += cut
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(sizes=shard_sizes, window=st.integers(1, 100))
def test_a_sample_moves_less_than_the_window(sizes: np.ndarray, window: int) -> None:
    order = EpochOrder(sizes, seed=2, window=window)
    if window >= order.num_samples:
        return  # shuffled completely
    unmoved = EpochOrder(sizes, seed=2, window=1).epoch(0)  # the permuted shards alone
    place = np.argsort(unmoved)
    assert np.abs(place[order.epoch(0)] - np.arange(order.num_samples)).max() < window


def test_window_of_one_leaves_shards_whole() -> None:
    order = EpochOrder(np.array([3, 1, 4]), seed=0, window=1).epoch(0)
    shards = [[0, 1, 2], [3], [4, 5, 6, 7]]
    found = [shard for start in order.tolist() for shard in shards if shard[0] == start]
    assert [sample for shard in found for sample in shard] == order.tolist()


def test_epochs_and_seeds_differ() -> None:
    sizes = np.full(20, 50, dtype=np.int64)
    orders = [EpochOrder(sizes, seed=seed).epoch(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for first in range(3):
        for second in range(first):
            assert (orders[first] == orders[second]).mean() < 0.02


def test_shuffle_is_thorough() -> None:
    """Neighbours in the stream are not neighbours in the shards: rank correlation near zero, within a full window."""
    order = EpochOrder(np.full(10, 1000, dtype=np.int64), seed=3).epoch(0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05  # 5 standard errors
    first_half = np.bincount(order[:5000] // 1000, minlength=10)
    assert first_half.min() > 420  # of 500 expected from each shard


def test_order_is_part_of_the_format() -> None:
    """A release that changed these numbers would change every resumed run."""
    order = EpochOrder(np.array([5, 3, 4], dtype=np.int64), seed=42, window=4)
    assert order.epoch(0).tolist() == [1, 0, 2, 3, 4, 9, 10, 8, 11, 5, 6, 7]
    assert EpochOrder(np.array([5, 3, 4], dtype=np.int64), seed=42).epoch(7).tolist() == [
        2,
        8,
        4,
        11,
        9,
        10,
        5,
        6,
        0,
        7,
        3,
        1,
    ]


def test_seeking_far_costs_one_epoch() -> None:
    order = EpochOrder(np.full(1300, 986, dtype=np.int64), seed=0)  # as large as ImageNet
    began = time.perf_counter()
    order.samples(10**12, 256)
    first = time.perf_counter() - began
    began = time.perf_counter()
    order.samples(10**12 + 256, 256)
    assert first < 5
    assert time.perf_counter() - began < first / 10
