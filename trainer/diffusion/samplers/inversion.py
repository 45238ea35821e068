"""The way back: the noise that an image comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.predictor import Predictor


@torch.no_grad()
def ddim_inversion(predictor: Predictor, x0: Tensor) -> Tensor:
    """The x_T that DDIM with eta = 0 would make x0 of (Song et al. 2021, DDIM, section 4.3): Euler's method upwards.

    Each step takes the x_0 and eps predicted at its lower level to its upper one, where going down takes those of the
    upper: so a round trip returns to x0 up to an error that falls as 1 / steps. Without noise the network cannot be
    asked: the first step takes what it says of alpha * x0 at the lowest level. Bounding x_0 makes levels
    indistinguishable: leave the predictor's threshold out unless the sampler has it too.

    Args:
        x0: images, [B, C, H, W] in [-1, 1].

    Returns x at the last, noisiest step, [B, C, H, W]. As many network calls as the process has steps.
    """
    level = predictor.diffusion.schedule.level
    x = level(0).alpha * x0
    for end in range(predictor.diffusion.num_timesteps):
        prediction, there = predictor(x, max(end - 1, 0)), level(end)
        x = there.alpha * prediction.x0 + there.sigma * prediction.eps
    return x
