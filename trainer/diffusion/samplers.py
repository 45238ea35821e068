"""Samplers: from noise to images along a process, as functions of (denoiser, x_T, process).

All noise of a sample comes from its own seed: who else is in the batch changes none of its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.counter_rng import Stream, generator
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion

Progress = Callable[[], object]  # called after every step


class SampleNoise:
    """Standard normal noise for a batch of samples, sample i's from a generator of its own seed."""

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], *, seed: int = 0, device: str = "cpu"
    ) -> None:
        self._generators = [generator(seed, Stream.SAMPLE, s) for s in seeds]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        """The next noise of every sample: [B, C, H, W] float32."""
        noise = np.stack([g.standard_normal(self._shape, dtype=np.float32) for g in self._generators])
        return torch.from_numpy(noise).to(self._device)


@torch.no_grad()
def ancestral(
    denoiser: Denoiser, noise: SampleNoise, diffusion: GaussianDiffusion, *, progress: Progress = lambda: None
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over all steps of the process: [B, C, H, W] in [-1, 1]."""
    x = noise()
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        prediction = diffusion.predict(denoiser(x, diffusion.network_time(t)), x, t, clip=True)
        x = prediction.mean
        if step > 0:
            x = x + torch.exp(0.5 * prediction.log_variance) * noise()
        progress()
    return x.clamp(-1, 1)


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    noise: SampleNoise,
    diffusion: GaussianDiffusion,
    *,
    eta: float = 0.0,
    progress: Progress = lambda: None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta = 0 is deterministic given x_T: [B, C, H, W] in [-1, 1]."""
    s = diffusion.schedule
    x = noise()
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        prediction = diffusion.predict(denoiser(x, diffusion.network_time(t)), x, t, clip=True)
        alpha, alpha_prev = s.alphas_cumprod[step], s.alphas_cumprod_prev[step]
        sigma = eta * torch.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        x = alpha_prev.sqrt().float() * prediction.x0 + (1 - alpha_prev - sigma**2).sqrt().float() * prediction.eps
        if step > 0 and eta > 0:
            x = x + sigma.float() * noise()
        progress()
    return x.clamp(-1, 1)


SAMPLERS = {"ancestral": ancestral, "ddim": ddim}


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 256 grey levels: uint8, same shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
