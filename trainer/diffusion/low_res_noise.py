"""Noise on what a super-resolution network enlarges: conditioning augmentation (Ho et al. 2021, section 4).

The network is trained on, and told of, low-resolution images that are noisy to many a step s of the process of the
stage below. So it does not take the small errors of that stage's images for details of real ones. In sampling s is
chosen, and there are two ways to images that noisy: to make small images completely and noise them again, or to end
the stage below at its step s ("truncated": it saves the stage's last steps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion


@dataclass(frozen=True)
class LowResNoise:
    """How noisy low-resolution images can be: s = 0 is not at all, s > 0 is step s of the whole process.

    Step 0 of the process, its least noise, is no s: as with the samplers' `stop`, 0 means the image itself.
    """

    process: GaussianDiffusion

    @classmethod
    def create(cls, config: DiffusionConfig, device: torch.device | str = "cpu") -> LowResNoise:
        """`config`: of the process of the stage below."""
        return cls(GaussianDiffusion.create(config, device))

    def add(self, z0: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """z_s ~ q(z_s | z_0) for given standard normal noise: [B, C, h, w] in [-1, 1], s [B] -> [B, C, h, w]."""
        is_noisy = (step > 0).view(-1, *[1] * (z0.ndim - 1))
        return torch.where(is_noisy, self.process.q_sample(z0, step, noise), z0)

    def time(self, step: Tensor) -> Tensor:
        """s as the network is told of it, in the units of its time: [B] -> [B] float32."""
        return self.process.network_time(step)
