"""DDIM: chains with other, or no, noise that the same network belongs to."""

from __future__ import annotations

import math

from torch import Tensor

from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers.sampler import Noise, Solver


def ddim(predictor: Predictor, noise: Noise, *, eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2021, eq. 12 and 16).

    eta = 0 is deterministic given x_T and draws no noise; eta = 1 has the variance beta-tilde of `fixed_small`.
    """
    level = predictor.diffusion.schedule.level

    def solve(x: Tensor, start: int, end: int) -> Tensor:
        prediction, here, there = predictor(x, start), level(start), level(end)
        a, a_next = here.alpha_cumprod, there.alpha_cumprod
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))  # of the new noise
        x = there.alpha * prediction.x0 + math.sqrt(max(1 - a_next - sigma**2, 0.0)) * prediction.eps
        return x + sigma * noise() if eta > 0 and end >= 0 else x

    return solve
