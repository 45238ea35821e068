"""The gradient noise scale where the gradient's distribution is known, and under the engine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

from trainer.noise_scale import NoiseScale, SmoothedNoiseScale, estimates

MICRO, ACCUMULATION, DIM = 4, 8, 6
BATCH = MICRO * ACCUMULATION


class Linear(nn.Module):
    """loss = -w.x: the gradient of an image is -x, whatever w is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(DIM // 2)), nn.Parameter(torch.zeros(DIM // 2))

    def loss(self, x: torch.Tensor) -> torch.Tensor:  # x [B, DIM]
        return -(x @ torch.cat([self.a, self.b])).mean()


def step(model: Linear, noise: NoiseScale, x: torch.Tensor, scale: float = 1.0) -> None:
    """The backward passes of a step on x [BATCH, DIM], as the engine makes them."""
    for micro in x.split(MICRO):
        (model.loss(micro) * scale / ACCUMULATION).backward()


def make(model: Linear) -> NoiseScale:
    return NoiseScale(model.parameters(), micro_batch=MICRO, global_batch=BATCH, accumulation=ACCUMULATION)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_small_square_is_the_mean_of_the_micro_batches_squared_norms(scale: float | None) -> None:
    model, x = Linear(), torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(0))
    noise = make(model)
    loss_scale = None if scale is None else torch.tensor(scale)
    with noise.watch(True, loss_scale):
        step(model, noise, x, scale or 1.0)
        if loss_scale is not None:
            loss_scale.mul_(2)  # what the end of a step may do
    expected = torch.stack([micro.mean(dim=0).square().sum() for micro in x.split(MICRO)]).mean()
    assert float(noise.small_square()) == pytest.approx(float(expected), rel=1e-6)  # type: ignore[arg-type]


def test_it_listens_only_while_asked() -> None:
    model = Linear()
    noise = make(model)
    with noise.watch(False):
        step(model, noise, torch.randn(BATCH, DIM))
    assert noise.small_square() is None
    with noise.watch():
        step(model, noise, torch.ones(BATCH, DIM))
    step(model, noise, torch.full((BATCH, DIM), 100.0))  # nobody listens any more
    assert float(noise.small_square()) == pytest.approx(DIM)  # type: ignore[arg-type]


def test_one_batch_size_measures_nothing() -> None:
    model = Linear()
    noise = NoiseScale(model.parameters(), micro_batch=4, global_batch=4, accumulation=1)
    with noise.watch():
        model.loss(torch.ones(4, DIM)).backward()
    assert noise.small_square() is None


def test_estimates_invert_the_expectations_exactly() -> None:
    trace, square = 7.0, 0.3
    found = estimates(square + trace / 4, square + trace / 32, small=4, big=32)
    assert found == pytest.approx((trace, square), rel=1e-12)


def test_both_estimates_are_unbiased() -> None:
    """Against known mean and covariance, within four standard errors, which are smaller than the bias of |G_B|^2."""
    generator = torch.Generator().manual_seed(1)
    mean = 0.3 * torch.randn(DIM, generator=generator)
    root = torch.randn(DIM, DIM, generator=generator)  # covariance: root root^T
    trace, square = float(root.square().sum()), float(mean.square().sum())
    model = Linear()
    noise, found = make(model), []
    smoothed, scale = SmoothedNoiseScale(small=MICRO, big=BATCH), None
    for _ in range(2000):
        x = mean + torch.randn(BATCH, DIM, generator=generator) @ root.T
        model.zero_grad()
        with noise.watch():
            step(model, noise, x)
        big = sum(float(p.grad.square().sum()) for p in model.parameters())  # type: ignore[union-attr]
        small = float(noise.small_square())  # type: ignore[arg-type]
        found.append(estimates(small, big, small=MICRO, big=BATCH))
        scale = smoothed.add(small, big)
    table = torch.tensor(found, dtype=torch.float64)
    errors = table.std(dim=0) / math.sqrt(len(table))
    assert ((table.mean(dim=0) - torch.tensor([trace, square])).abs() < 4 * errors).all()
    assert 4 * errors[1] < trace / BATCH  # so the naive |G_B|^2 would fail
    # Some 39 measurements count in the smoothed ratio.
    assert scale is not None
    assert trace / square / 3 < scale < trace / square * 3


def test_no_figure_without_positive_estimates() -> None:
    smoothed = SmoothedNoiseScale(small=4, big=32)
    assert smoothed.add(8.0, 0.5) is None  # |G|^2 would be negative
    assert smoothed.add(2.0, 1.8) == pytest.approx(
        (0.95 * 7.5 + 0.2) / (1 / 4 - 1 / 32) / ((0.95 * (16 - 32) + (57.6 - 8)) / 28)
    )


@pytest.mark.parametrize("cases", ["4 5", pytest.param("0 1 2 3 6", marks=pytest.mark.prove)])
def test_hooks_see_a_micro_batchs_own_gradient_under_the_engine(tiny_config: Path, tmp_path: Path, cases: str) -> None:
    """ZeRO 0 to 3, two processes, accumulation, activation checkpointing, bf16 and fp16."""
    command = ["tests/trainer/noise_ranks.py", str(tiny_config), str(tmp_path / "run"), *cases.split()]
    assert run_ranks(command, world_size=2).count(f"checked {cases}") == 2
