"""Training objectives: L_simple, L_vlb and their hybrid (Nichol & Dhariwal 2021, section 3.1).

L_simple is the squared error of what the network predicts, or of the quantity that `mse_target` names (the eps-, x0-
or v-loss). L_vlb enters as T * L_t in bits/dim, so that its mean under uniform t is the bound. L_hybrid is
L_simple + weight * L_vlb; the weight goes by the names of the published code's two conventions:

- `rescaled`: 1 / 1000, whatever T ("rescale_learned_sigmas" on: L_t is multiplied by T / 1000).
- `unrescaled`: 1 / T ("rescale_learned_sigmas" off: L_t itself is added).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from trainer.diffusion.gaussian import GaussianDiffusion, Prediction
from trainer.diffusion_config import DiffusionConfig


@dataclass(frozen=True)
class Losses:
    """Per image, each [B]: what is minimised, and its parts where the objective has them."""

    loss: Tensor
    mse: Tensor | None  # L_simple: a mean over dimensions
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

    - simple: the squared error.
    - vlb: T * L_t in bits/dim.
    - hybrid: simple + vlb_factor * vlb, where the vlb term trains the variance alone (its mean is detached).
    """
    prediction = diffusion.predict(output, x_t, t, clip=False)
    if config.objective == "vlb":
        vb = diffusion.vb_terms(prediction, x0, x_t, t) * diffusion.num_timesteps
        return Losses(loss=vb, mse=None, vb=vb)
    target = config.mse_target or config.prediction
    error = diffusion.quantity(target, prediction.x0, prediction.eps, x_t, t) - diffusion.quantity(
        target, x0, noise, x_t, t
    )
    mse = error.square().flatten(1).mean(dim=1)
    if config.objective == "simple":
        return Losses(loss=mse, mse=mse, vb=None)
    vb = diffusion.vb_terms(_detach_mean(prediction), x0, x_t, t) * diffusion.num_timesteps
    return Losses(loss=mse + config.vlb_factor * vb, mse=mse, vb=vb)


def _detach_mean(prediction: Prediction) -> Prediction:
    return replace(prediction, mean=prediction.mean.detach())
