"""Timestep samplers: unbiased, ordered, and equal to a slow loop."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.diffusion.timesteps import HISTORY, LossSecondMomentSampler, UniformSampler


def test_uniform_covers_all_timesteps_evenly() -> None:
    t, weights = UniformSampler(10).draw(torch.arange(1000, dtype=torch.float64) / 1000)
    assert torch.bincount(t).tolist() == [100] * 10
    assert (weights == 1).all()
    assert UniformSampler(10).draw(torch.tensor([1 - 1e-17], dtype=torch.float64))[0].item() == 9


def test_history_equals_a_plain_loop() -> None:
    """Repeats within a step included, also more than ten of one timestep at once, and losses that are not finite."""
    torch.manual_seed(0)
    sampler = LossSecondMomentSampler(5)
    rings: list[list[float]] = [[] for _ in range(5)]
    for size in (1, 7, 96, 3, 60):
        t, losses = torch.randint(0, 5, (size,)), torch.rand(size)
        losses[::3] = torch.tensor([torch.nan, torch.inf]).repeat(size)[: len(losses[::3])]
        sampler.update(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                rings[step].append(loss)
        for step, ring in enumerate(rings):
            kept = sorted(ring[-HISTORY:]) + [0.0] * (HISTORY - len(ring[-HISTORY:]))
            found = sampler.history[step]
            torch.testing.assert_close(found.sort().values, torch.tensor(kept, dtype=torch.float64).sort().values)
            assert int(sampler.counts[step]) == len(ring)


def test_uniform_until_every_timestep_is_known() -> None:
    sampler = LossSecondMomentSampler(4)
    sampler.update(torch.tensor([0, 1, 2] * HISTORY), torch.rand(3 * HISTORY))
    assert torch.allclose(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    assert float(sampler.warmed_up_share()) == 0.75
    sampler.update(torch.full((HISTORY,), 3), torch.full((HISTORY,), 9.0))
    assert float(sampler.warmed_up_share()) == 1.0
    assert sampler.probabilities()[3] > 0.5


def test_importance_weights_keep_the_expectation() -> None:
    torch.manual_seed(1)
    sampler = LossSecondMomentSampler(20)
    losses = torch.rand(20) ** 4 * 10
    for _ in range(HISTORY):
        sampler.update(torch.arange(20), losses)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, weights = sampler.draw(u)
    assert float((losses[t] * weights).mean()) == pytest.approx(float(losses.mean()), rel=1e-3)
    assert torch.bincount(t, minlength=20).min() > 0  # the uniform share reaches every timestep


def test_state_round_trip() -> None:
    sampler, other = LossSecondMomentSampler(6), LossSecondMomentSampler(6)
    sampler.update(torch.arange(6), torch.rand(6))
    other.load(sampler.state())
    assert torch.equal(sampler.probabilities(), other.probabilities())
    assert torch.equal(sampler.counts, other.counts)
