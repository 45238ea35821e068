"""Numbers belong to images, not to whoever draws them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.counter_rng import CHUNK, Stream, normal, uniform


@given(start=st.integers(0, 10**12), count=st.integers(1, 70), cut=st.integers(0, 70))
def test_any_cut_of_a_slice_gives_the_same_numbers(start: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = uniform(3, Stream.FLIP, start, count)
    parts = [uniform(3, Stream.FLIP, start, cut), uniform(3, Stream.FLIP, start + cut, count - cut)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_one_image_alone_gets_its_row_of_the_batch() -> None:
    whole = normal(1, Stream.NOISE, 5, 40, (3, 4))
    for n in (5, CHUNK - 1, CHUNK, 44):
        np.testing.assert_array_equal(normal(1, Stream.NOISE, n, 1, (3, 4))[0], whole[n - 5])


def test_seeds_streams_and_images_are_independent() -> None:
    draws = [
        uniform(0, Stream.FLIP, 0, 1000), uniform(1, Stream.FLIP, 0, 1000),
        uniform(0, Stream.TIMESTEP, 0, 1000), uniform(0, Stream.FLIP, 1000, 1000),
    ]  # fmt: skip
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 0.15  # 4.7 standard errors
    assert len(np.unique(np.concatenate(draws))) == 4000
