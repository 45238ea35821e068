"""Training objectives: L_simple, L_vlb and their hybrid (Nichol & Dhariwal 2021, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion, Prediction


@dataclass(frozen=True)
class Losses:
    """Per image, each [B]: what is minimised, and its parts where the objective has them."""

    loss: Tensor
    mse: Tensor | None  # mean squared error of eps
    vb: Tensor | None  # T times the bound's term at t: an unbiased estimate of L_vlb in bits/dim under uniform t


def training_losses(
    diffusion: GaussianDiffusion,
    config: DiffusionConfig,
    output: Tensor,
    *,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Losses:
    """The losses of a batch, unweighted (a timestep sampler's weights come on top).

    - simple: the squared error of eps.
    - vlb: T * L_t in bits/dim.
    - hybrid: simple + vlb_weight * vlb, where the vlb term trains the variance alone (its mean is detached).
    """
    prediction = diffusion.predict(output, x_t, t, clip=False)
    if config.objective == "vlb":
        vb = diffusion.vb_terms(prediction, x0, x_t, t) * diffusion.num_timesteps
        return Losses(loss=vb, mse=None, vb=vb)
    mse = ((prediction.eps - noise) ** 2).mean(dim=(1, 2, 3))
    if config.objective == "simple":
        return Losses(loss=mse, mse=mse, vb=None)
    vb = diffusion.vb_terms(_detach_mean(prediction), x0, x_t, t) * diffusion.num_timesteps
    return Losses(loss=mse + config.vlb_weight * vb, mse=mse, vb=vb)


def _detach_mean(prediction: Prediction) -> Prediction:
    return replace(prediction, mean=prediction.mean.detach())
