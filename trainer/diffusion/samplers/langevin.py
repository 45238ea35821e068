"""The corrector of predictor-corrector sampling: Langevin dynamics at one level of noise."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers.sampler import Corrector, Noise


def langevin(num_steps: int, snr: float) -> Corrector:
    """Annealed Langevin dynamics (Song et al. 2021, SDE, algorithm 5): steps that leave p(x_t) as it is.

        x <- x + size * score + sqrt(2 size) z,    size = 2 alpha_t (snr |z| / |score|)²

    Here the norms are of each image, where theirs are means over the batch: so a sample does not depend on who is
    sampled with it. alpha_t = 1 - beta_t is that of the process the network was trained on, so that a step means the
    same on any respacing.

    Args:
        snr: r, the ratio of the two moves of a step; 0.16 in the paper's code.
    """

    def correct(predictor: Predictor, x: Tensor, step: int, noise: Noise) -> Tensor:
        own, trained = predictor.diffusion.schedule, predictor.diffusion.trained
        t = own.original(step)
        alpha = trained.level(t).alpha_cumprod / trained.level(t - 1).alpha_cumprod
        for _ in range(num_steps):
            score, z = predictor(x, step).eps / -own.level(step).sigma, noise()
            size = 2 * alpha * (snr * _norm(z) / _norm(score)) ** 2
            size = size.nan_to_num(posinf=0.0)  # a network that has learned nothing yet may say eps = 0
            x = x + size * score + torch.sqrt(2 * size) * z
        return x

    return correct


def _norm(images: Tensor) -> Tensor:
    """The length of each image: [B, 1, 1, 1]."""
    length: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return length.view(-1, *[1] * (images.ndim - 1))
