"""Prefetching: in order, bounded, with its errors where they belong, and quiet when closed."""

from __future__ import annotations

import threading
import time

import pytest

from data_pipeline.prefetch import Prefetcher


@pytest.mark.parametrize("num_threads", [1, 3])
def test_items_come_in_order(num_threads: int) -> None:
    def make(start: int) -> int:
        time.sleep(0.002 * (start % 3))  # later ones may be ready first
        return start * start

    with Prefetcher(make, range(30), depth=4, num_threads=num_threads) as items:
        assert list(items) == [start * start for start in range(30)]


def test_makes_at_most_depth_items_ahead() -> None:
    made: list[int] = []
    with Prefetcher(lambda start: made.append(start), iter(range(1000)), depth=3) as items:
        for consumed in range(1, 10):
            next(items)
            time.sleep(0.01)
            assert len(made) <= consumed + 3
    count = len(made)
    time.sleep(0.02)
    assert len(made) == count  # nothing goes on after closing


def test_works_ahead_while_the_consumer_is_busy() -> None:
    def make(start: int) -> int:
        time.sleep(0.02)
        return start

    with Prefetcher(make, range(10), depth=2) as items:
        for _ in items:
            time.sleep(0.05)
        busy = items.wait_seconds
    with Prefetcher(make, range(10), depth=2) as items:
        list(items)
        idle = items.wait_seconds
    assert idle > 0.15  # ten items of 20 ms, nothing else to do
    assert busy < idle / 2


def test_error_comes_in_its_place_and_ends_the_iteration() -> None:
    def make(start: int) -> int:
        if start == 3:
            raise ValueError("damaged")
        return start

    items = Prefetcher(make, range(10))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="damaged"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    items = Prefetcher(lambda start: start, range(100), depth=4, num_threads=2)
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert list(items) == []


def test_may_have_fewer_items_than_its_depth() -> None:
    assert list(Prefetcher(lambda start: start, [5], depth=4)) == [5]
    assert list(Prefetcher(lambda start: start, [])) == []
