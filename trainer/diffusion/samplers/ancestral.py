"""Ancestral sampling: the reverse chain itself."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers.sampler import Noise, Solver


def ancestral(predictor: Predictor, noise: Noise) -> Solver:
    """x_{t-1} ~ p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2); x_0 is the mean of the last."""

    def solve(x: Tensor, start: int, end: int) -> Tensor:
        prediction = predictor.with_shifted_mean(x, start)
        if end < 0:
            return prediction.mean
        return prediction.mean + torch.exp(0.5 * prediction.log_variance) * noise()

    return solve
