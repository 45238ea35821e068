"""A cheap network with a realistic profile of L_t, for tests of the likelihood estimate."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.nll.terms import Conditioner
from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion


def make_process(num_timesteps: int, respacing: str | None = None) -> GaussianDiffusion:
    config = DiffusionConfig(num_timesteps=num_timesteps, variance="fixed_large", objective="simple")
    return GaussianDiffusion.create(config, respacing=respacing)


def gaussian_denoiser(process: GaussianDiffusion, deviation: float = 0.5) -> Conditioner:
    """Exact for data of independent normal pixels with this standard deviation."""
    num_timesteps = process.trained.num_timesteps

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alphas = process.trained.alphas_cumprod[(time * num_timesteps / 1000).round().long()].float().view(-1, 1, 1, 1)
        return (1 - alphas).sqrt() * x / (alphas * deviation**2 + 1 - alphas)

    def condition(labels: NDArray[np.int64]) -> Denoiser:
        return denoise

    return condition
