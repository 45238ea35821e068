"""The Gaussian diffusion process: noising, posteriors, what a network's output means, and the terms of the bound.

Images are [B, C, H, W] in [-1, 1]; t is [B] int64 in 0 .. T-1. Everything here computes in float32, whatever
precision the network runs in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.diffusion.schedules import Schedule, make_schedule

# A denoiser: (x_t [B, C, H, W], network time [B]) -> the network's output [B, C or 2C, H, W].
Denoiser = Callable[[Tensor, Tensor], Tensor]

HALF_BIN = 1.0 / 255.0  # images are k / 127.5 - 1, k = 0 .. 255: bins of width 2 / 255
LAST_BIN = 0.999  # beyond ±0.999 lie only the outermost bins, which are open-ended


@dataclass(frozen=True)
class Prediction:
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)) and the x_0 it implies, each [B, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    eps: Tensor


@dataclass(frozen=True)
class GaussianDiffusion:
    """One process: its tables and how the network's output is to be read."""

    schedule: Schedule
    variance: str  # "learned_range", "fixed_small" or "fixed_large"
    rescale_timesteps: bool

    @classmethod
    def create(
        cls, config: DiffusionConfig, device: torch.device | str = "cpu", steps: tuple[int, ...] | None = None
    ) -> GaussianDiffusion:
        """The process of a config; `steps` picks a shorter one (see `make_schedule`)."""
        schedule = make_schedule(config.schedule, config.num_timesteps, str(device), steps)
        return cls(schedule, config.variance, config.rescale_timesteps)

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_timesteps

    def network_time(self, t: Tensor) -> Tensor:
        """The time the network sees: the original process's step, times 1000 / T when rescaled. [B] float32."""
        original = self.schedule.timestep_map[t].float()
        return original * (1000.0 / self.schedule.num_original) if self.rescale_timesteps else original

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) for given standard normal noise (Ho et al. 2020, eq. 4)."""
        s = self.schedule
        return s.gather(s.sqrt_alphas_cumprod, t) * x0 + s.gather(s.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and log variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        s = self.schedule
        mean = s.gather(s.posterior_mean_x0, t) * x0 + s.gather(s.posterior_mean_xt, t) * x_t
        return mean, s.gather(s.posterior_log_variance, t)

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        s = self.schedule
        return (x_t - s.gather(s.sqrt_one_minus_alphas_cumprod, t) * eps) / s.gather(s.sqrt_alphas_cumprod, t)

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        s = self.schedule
        return (x_t - s.gather(s.sqrt_alphas_cumprod, t) * x0) / s.gather(s.sqrt_one_minus_alphas_cumprod, t)

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor, *, clip: bool) -> Prediction:
        """Read the network's output: the noise, and with a learned variance its interpolation v, side by side.

        `clip` bounds the implied x_0 to [-1, 1] (evaluation and sampling; training uses the bare mean).
        """
        eps, log_variance = self._split(output, x_t, t)
        x0 = self.x0_from_eps(x_t, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = self.eps_from_x0(x_t, t, x0)
        mean, _ = self.q_posterior(x0, x_t, t)
        return Prediction(mean, log_variance, x0, eps)

    def _split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self.schedule
        smallest, largest = s.gather(s.posterior_log_variance, t), s.gather(s.log_betas, t)
        if self.variance == "learned_range":
            eps, v = output.chunk(2, dim=1)
            fraction = (v + 1) / 2  # the network speaks in [-1, 1] (Nichol & Dhariwal 2021, eq. 15)
            return eps, torch.lerp(smallest.expand_as(v), largest.expand_as(v), fraction)
        if self.variance == "fixed_small":
            return output, smallest.expand_as(x_t)
        # beta, with the first step's replaced by the posterior's: the reference's choice for a better decoder
        first = (t == 0)[:, None, None, None]
        return output, torch.where(first, smallest, largest).expand_as(x_t)

    def vb_terms(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term of each image at its t, in bits/dim: [B].

        KL(q(x_{t-1} | x_t, x_0) || p) for t > 0 and the decoder's -log p(x_0 | x_1) for t = 0
        (Ho et al. 2020, eq. 5); their sum over all t, plus the prior term, is L_vlb.
        """
        true_mean, true_log_variance = self.q_posterior(x0, x_t, t)
        kl = mean_bits(normal_kl(true_mean, true_log_variance, prediction.mean, prediction.log_variance))
        first = t == 0
        if not first.is_cuda and not first.any():
            return kl  # the costly decoder term is not asked for; on a GPU, finding out would mean waiting
        decoder = -mean_bits(discretized_log_likelihood(x0, prediction.mean, 0.5 * prediction.log_variance))
        return torch.where(first, decoder, kl)

    def prior_bits(self, x0: Tensor) -> Tensor:
        """L_T: KL(q(x_T | x_0) || N(0, I)) in bits/dim: [B]. No network can change it."""
        s = self.schedule
        last = torch.full((len(x0),), self.num_timesteps - 1, device=x0.device)
        mean = s.gather(s.sqrt_alphas_cumprod, last) * x0
        log_variance = torch.log1p(-s.alphas_cumprod[last]).float()[:, None, None, None]
        return mean_bits(normal_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(log_variance)))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) elementwise, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.exp(difference) - 1 - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Exact log of a Gaussian's mass in the 8-bit bin around x, elementwise, in nats (Ho et al. 2020, eq. 13).

    By symmetry the bin is mirrored to the lower tail, where log Φ keeps full relative precision; the difference
    of the two CDFs is then taken in log space, so that no bin's mass is clamped or cancels.
    """
    inverse_scale = torch.exp(-log_scale)
    centered = x - mean
    folded = -centered.abs()
    upper = torch.special.log_ndtr((folded + HALF_BIN) * inverse_scale)
    lower = torch.special.log_ndtr((folded - HALF_BIN) * inverse_scale)
    inner = upper + torch.log(-torch.expm1(lower - upper))
    left = torch.special.log_ndtr((centered + HALF_BIN) * inverse_scale)  # everything below the first bin's top
    right = torch.special.log_ndtr(-(centered - HALF_BIN) * inverse_scale)
    return torch.where(x < -LAST_BIN, left, torch.where(x > LAST_BIN, right, inner))


def mean_bits(nats: Tensor) -> Tensor:
    """Mean over an image's dimensions, in bits: [B, C, H, W] -> [B]."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2.0)
