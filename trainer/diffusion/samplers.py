"""Samplers: from noise to images along a process, as pure functions of (denoiser, x_T, process).

What a sampler draws on its way comes from `noise`, a function that returns the next [B, C, H, W]. A step's arithmetic
is elementwise in the images, so a sample depends on its own x_T and noise alone, up to the rounding of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion, Prediction

Noise = Callable[[], Tensor]  # the next standard normal noise, [B, C, H, W]
Progress = Callable[[], object]  # called after every step


def no_progress() -> None:
    """For whoever does not watch."""


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    clip: bool = True,
    progress: Progress = no_progress,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over all steps of the process.

    Args:
        x: x_T, [B, C, H, W].
        clip: bound every predicted x_0 to [-1, 1].

    Returns x_0, [B, C, H, W].
    """
    for step in reversed(range(diffusion.num_timesteps)):
        prediction = _predict(denoiser, x, step, diffusion, clip)
        x = prediction.mean
        if step > 0:
            x = x + torch.exp(0.5 * prediction.log_variance) * noise()
        progress()
    return x


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: Noise,
    eta: float = 0.0,
    clip: bool = True,
    progress: Progress = no_progress,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16) over all steps of the process.

    eta = 0 is deterministic given x_T and draws no noise; eta = 1 has the variance beta-tilde of `fixed_small`.
    Arguments and result as for `ancestral`.
    """
    s = diffusion.schedule
    for step in reversed(range(diffusion.num_timesteps)):
        prediction = _predict(denoiser, x, step, diffusion, clip)
        alpha, alpha_prev = s.alphas_cumprod[step], s.alphas_cumprod_prev[step]  # float64 scalars, cumulative
        sigma = eta * torch.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        to_x0, to_eps = alpha_prev.sqrt(), (1 - alpha_prev - sigma**2).clamp(min=0).sqrt()
        x = to_x0.to(x.dtype) * prediction.x0 + to_eps.to(x.dtype) * prediction.eps
        if step > 0 and eta > 0:
            x = x + sigma.to(x.dtype) * noise()
        progress()
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ancestral": ancestral, "ddim": ddim}


def _predict(denoiser: Denoiser, x: Tensor, step: int, diffusion: GaussianDiffusion, clip: bool) -> Prediction:
    t = torch.full((len(x),), step, device=x.device)
    return diffusion.predict(denoiser(x, diffusion.network_time(t)), x, t, clip=clip)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 256 grey levels: uint8, same shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
