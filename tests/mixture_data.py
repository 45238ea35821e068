"""Data of two classes that diffusion can be solved for by hand: class k's pixels are N(MEANS[k], SPREAD²).

The best networks, with and without a class, and the best classifier of x_t are then closed forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion

SHAPE = (1, 1, 2)
MEANS = torch.tensor([[0.3, -0.2], [-0.1, 0.2]], dtype=torch.float64).view(2, *SHAPE)  # [K, C, H, W]
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)  # of the classes
SPREAD = 0.2


class Exact:
    """What perfect networks of a process say. They were trained on all T steps: they know no other process."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.process = GaussianDiffusion.create(config)

    def classifier(self, x: Tensor, time: Tensor) -> Tensor:
        """Logits of p(class | x_t): the logarithms of p(class, x_t), up to what is the same for all."""
        means, variance = self._noised(x, time)
        squares = (x[:, None] - means).square().flatten(2).sum(dim=2)  # [B, K]
        return SHARES.log() - squares / (2 * variance.flatten(1))

    def network(self, x: Tensor, time: Tensor, labels: Tensor | None = None, *_: Tensor | None) -> Tensor:
        """What the process's network predicts; for labels [B], -1: without a class."""
        means, variance = self._noised(x, time)
        shares = self.classifier(x, time).softmax(dim=1)  # [B, K]
        if labels is not None:
            of_class = torch.nn.functional.one_hot(labels.clamp(min=0), len(MEANS)).double()
            shares = torch.where(labels[:, None] < 0, shares, of_class)
        score = (shares.view(*shares.shape, 1, 1, 1) * (means - x[:, None])).sum(dim=1) / variance
        t = time.long()
        _, sigma = self.process.signal_and_noise(t, x)
        x0, eps = self.process.x0_and_eps("eps", -sigma * score, x, t)
        return self.process.quantity(self.process.prediction, x0, eps, x, t)

    def _noised(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Means [B, K, C, H, W] of the classes' x_t, and their variance [B, 1, 1, 1]."""
        assert not self.process.rescale_timesteps
        alpha, sigma = self.process.signal_and_noise(time.long(), x)
        return alpha[:, None] * MEANS, alpha**2 * SPREAD**2 + sigma**2
