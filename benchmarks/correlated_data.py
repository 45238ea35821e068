"""Gaussian data whose pixels are correlated: what every sampler does with it is an affine map, known exactly.

A solver of the exact denoiser is affine in x_T and in each noise that it draws. So one batch, of nothing and of every
unit vector in turn, tells its map, and from it the mean and covariance of what it makes: no sampling error is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.schedules import Level, schedule_of

SHAPE = (3, 1, 2)  # of an image
DIM = 6
DEVIATIONS = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.6, 0.9], dtype=torch.float64)  # along the axes of the covariance
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4, 0.2], dtype=torch.float64)
AXES = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
COVARIANCE = AXES @ torch.diag(DEVIATIONS**2) @ AXES.T


@dataclass(frozen=True)
class Affine:
    """x -> matrix @ x + shift, plus noise of a covariance."""

    matrix: Tensor  # [D, D]
    shift: Tensor  # [D]
    added: Tensor  # [D, D]

    def law(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what it makes of a Gaussian."""
        return self.matrix @ mean + self.shift, self.matrix @ covariance @ self.matrix.T + self.added


def marginal(level: Level) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x at a level of noise."""
    eye = torch.eye(DIM, dtype=torch.float64)
    return level.alpha * MEAN, level.alpha**2 * COVARIANCE + level.sigma**2 * eye


def exact_flow(here: Level, there: Level) -> Affine:
    """The map of the probability-flow ODE: along each axis x/alpha - mean goes as the root of its variance + s²."""

    def spread(level: Level) -> Tensor:
        return (level.alpha * DEVIATIONS) ** 2 + level.sigma**2

    matrix = AXES @ torch.diag((spread(there) / spread(here)).sqrt()) @ AXES.T
    return Affine(matrix, (there.alpha * MEAN) - matrix @ (here.alpha * MEAN), torch.zeros_like(matrix))


def exact_denoiser(config: DiffusionConfig, process: GaussianDiffusion) -> Denoiser:
    """The perfect network for a config, on any respacing of `process`, which is the whole one.

    Images may be larger than `SHAPE`: then each six of their pixels, in order, are independent of the others.
    """

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        t = time.long()
        assert bool((t == t[0]).all())
        level = process.schedule.level(int(t[0]))
        mean, covariance = marginal(level)
        gain = level.alpha * COVARIANCE @ torch.linalg.inv(covariance)
        x0 = ((x.reshape(-1, DIM) - mean) @ gain.T + MEAN).view_as(x)
        value = process.quantity(config.prediction, x0, (x - level.alpha * x0) / level.sigma, x, t)
        if not config.learns_variance:
            return value
        return torch.cat([value, torch.zeros_like(value)], dim=1)

    return denoiser


def affine_map(name: str, predictor: Predictor, **options: Any) -> Affine:
    """What a sampler does with any x_T and noise."""
    draws = _count_draws(name, predictor, **options)
    rows = 1 + DIM * (1 + draws)
    inputs = torch.zeros(1 + draws, rows, DIM, dtype=torch.float64)  # x_T, and every noise
    for i in range(1 + draws):
        inputs[i, 1 + DIM * i : 1 + DIM * (i + 1)] = torch.eye(DIM, dtype=torch.float64)
    x_last, *noises = inputs.view(1 + draws, rows, *SHAPE)
    shift, *columns = SAMPLERS[name](predictor, x_last, noise=iter(noises).__next__, **options).flatten(1)
    parts = (torch.stack(columns) - shift).view(1 + draws, DIM, DIM).mT  # unit vectors' images are columns
    return Affine(parts[0], shift, (parts[1:] @ parts[1:].mT).sum(dim=0))


def _count_draws(name: str, predictor: Predictor, **options: Any) -> int:
    drawn: list[Tensor] = []

    def noise() -> Tensor:
        drawn.append(torch.zeros(1, *SHAPE, dtype=torch.float64))
        return drawn[-1]

    SAMPLERS[name](predictor, noise(), noise=noise, **options)
    return len(drawn) - 1


def predictor_of(config: DiffusionConfig, respacing: str | None = None) -> Predictor:
    """The perfect network on a respacing of a config's process; it was trained on all of it. Nothing is bounded."""
    denoiser = exact_denoiser(config, GaussianDiffusion.create(config))
    return Predictor(denoiser, GaussianDiffusion.create(config, respacing=respacing), threshold=None)


def process_at(half_logsnr: Tensor, config: DiffusionConfig) -> GaussianDiffusion:
    """A process of these levels, from the least noisy on: [T], falling."""
    alphas_cumprod = torch.sigmoid(2 * half_logsnr.double()).numpy()
    betas = 1 - alphas_cumprod / [1.0, *alphas_cumprod[:-1]]
    num = len(betas)
    schedule = schedule_of(betas, torch.arange(num).numpy(), num, "cpu")
    return GaussianDiffusion(schedule, schedule, config.prediction, config.variance, rescale_timesteps=False)
