"""Loss spikes are found, and ordinary losses are not taken for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.spikes import MIN_SEEN, SpikeWatch


def spikes(losses: list[float], images: list[int] | None = None) -> list[int]:
    """Indices of the intervals that count as spikes."""
    watch = SpikeWatch()
    sizes = images or [1024] * len(losses)
    return [i for i, (loss, n) in enumerate(zip(losses, sizes, strict=True)) if watch.look(i * 1024, loss, n)[0]]


def noisy(level: np.ndarray, spread: float, seed: int = 0) -> list[float]:
    return (level * np.exp(spread * np.random.default_rng(seed).normal(size=len(level)))).tolist()


def test_a_jump_is_found_and_told_once() -> None:
    losses = noisy(np.full(60, 0.05), 0.03)
    losses[40:43] = [0.2, 0.3, 0.15]
    assert spikes(losses) == [40, 41, 42]
    watch = SpikeWatch()
    lines = [line for i, loss in enumerate(losses) if (line := watch.look(1024 * (i + 1), loss, 1024)[1])]
    assert len(lines) == 1
    assert "0.2 at 41,984 images" in lines[0]


@pytest.mark.parametrize(
    "level",
    [
        np.arange(1, 2001) ** -0.5,
        0.03 + np.exp(-np.arange(2000) / 3),  # the first intervals of a real run
        np.where(np.arange(2000) < 60, 1.0, 0.1),
        np.exp(np.arange(2000) / 2000),  # a slow rise is no spike
    ],
    ids=["power law", "steep start", "drop", "slow rise"],
)
def test_learning_is_no_spike(level: np.ndarray) -> None:
    assert spikes(noisy(level, 0.05)) == []


def test_heavy_tails_are_no_spikes() -> None:
    """Means of log-normal losses whose largest images are thousands of times the usual, as L_vlb's are."""
    random = np.random.default_rng(0)
    means = np.exp(2 * random.normal(size=(1000, 256))).mean(axis=1)
    assert len(spikes(means.tolist())) <= 2


def test_a_short_interval_may_stray_further() -> None:
    losses = noisy(np.full(60, 1.0), 0.1)
    losses[50] = 3.5
    assert spikes(losses) == [50]
    assert spikes(losses, [1024] * 50 + [64] + [1024] * 9) == []


def test_a_new_level_becomes_usual() -> None:
    found = spikes([1.0] * 60 + [2.0] * 60)
    assert found[0] == 60
    assert len(found) < 30


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=25, max_size=80),
    st.integers(-20, 20),
)
def test_scale_does_not_matter(losses: list[float], power: int) -> None:
    assert spikes(losses) == spikes([loss * 2.0**power for loss in losses])


@given(st.lists(st.floats(1e-6, 1e6), max_size=MIN_SEEN))
def test_nothing_is_said_before_enough_is_seen(losses: list[float]) -> None:
    assert spikes(losses) == []


@given(st.lists(st.floats(0.0, 1e6), min_size=25, max_size=80))
def test_what_fires_is_above_the_median(losses: list[float]) -> None:
    for i in spikes(losses):
        assert losses[i] > sorted(losses[max(0, i - 50) : i])[(min(i, 50) - 1) // 2]
        assert math.isfinite(losses[i])
