"""The Gaussian diffusion process: noising, posteriors, what a network's output means, and the terms of the bound.

Images are [B, C, H, W] in [-1, 1], float32 (or float64, which everything here then keeps); t is [B] int64 in
0 .. T-1. The network may run in whatever precision: its output is read in the images'.

A respaced process visits only some of the steps that the network was trained on. What a network says about x_0 or eps
holds on any of them; a mean or a variance of x_{t-1} is that of the network's own process, and is translated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.config.diffusion import LEARNED, DiffusionConfig, Quantity, Variance
from trainer.diffusion.likelihoods import discretized_log_likelihood, mean_bits, normal_kl
from trainer.diffusion.schedules import Schedule, make_schedule
from trainer.diffusion.thresholding import Threshold

# A denoiser: (x_t [B, C, H, W], network time [B]) -> the network's output [B, C or 2C, H, W].
Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prediction:
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x_0 and eps it implies, each [B, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    eps: Tensor


@dataclass(frozen=True)
class GaussianDiffusion:
    """One process: its tables and how the network's output is to be read."""

    schedule: Schedule
    trained: Schedule  # of the whole process, the network's own; the same one unless respaced
    prediction: Quantity
    variance: Variance
    rescale_timesteps: bool

    @classmethod
    def create(
        cls, config: DiffusionConfig, device: torch.device | str = "cpu", respacing: str | None = None
    ) -> GaussianDiffusion:
        """The process of a config; `respacing` picks a shorter one (see `space_timesteps`)."""
        name, num_timesteps, shape = config.schedule, config.num_timesteps, config.schedule_shape
        trained = make_schedule(name, num_timesteps, str(device), **shape)
        schedule = make_schedule(name, num_timesteps, str(device), respacing, **shape)
        schedule = trained if schedule.num_timesteps == trained.num_timesteps else schedule
        return cls(schedule, trained, config.prediction, config.variance, config.rescale_timesteps)

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_timesteps

    def first(self, num_steps: int) -> GaussianDiffusion:
        """The process of its first, least noisy steps alone: from x at its last one a sampler goes on to x_0."""
        schedule = self.schedule.first(num_steps)
        return replace(self, schedule=schedule, trained=schedule if self.schedule is self.trained else self.trained)

    def network_time(self, t: Tensor) -> Tensor:
        """The time the network sees: the original process's step, times 1000 / T when rescaled. [B] float32."""
        original = self.schedule.timestep_map[t].float()
        return original * (1000.0 / self.schedule.num_original) if self.rescale_timesteps else original

    # ---- the forward process --------------------------------------------------------------------------------------

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B, 1, 1, 1], such that x_t = alpha * x_0 + sigma * eps."""
        s = self.schedule
        return s.gather(s.sqrt_alphas_cumprod, t, like), s.gather(s.sqrt_one_minus_alphas_cumprod, t, like)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) for given standard normal noise (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self.signal_and_noise(t, x0)
        return alpha * x0 + sigma * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and log variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        s = self.schedule
        mean = s.gather(s.posterior_mean_x0, t, x_t) * x0 + s.gather(s.posterior_mean_xt, t, x_t) * x_t
        return mean, s.gather(s.posterior_log_variance, t, x_t)

    # ---- what a network may predict -------------------------------------------------------------------------------

    def x0_and_eps(self, kind: Quantity, value: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and eps that a quantity implies at x_t, each by the form that loses the fewest digits.

        v = alpha * eps - sigma * x_0 is that of Salimans & Ho 2022 (appendix D).
        """
        alpha, sigma = self.signal_and_noise(t, x_t)
        if kind == "eps":
            return (x_t - sigma * value) / alpha, value
        if kind == "v":
            return alpha * x_t - sigma * value, sigma * x_t + alpha * value
        x0 = value
        if kind == "previous_mean":
            on_x0, on_xt = self._trained_mean(t, x_t)
            x0 = (value - on_xt * x_t) / on_x0
        return x0, (x_t - alpha * x0) / sigma

    def quantity(self, kind: Quantity, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The inverse of `x0_and_eps`: the quantity that x_0 and eps imply at x_t."""
        if kind == "eps":
            return eps
        if kind == "x0":
            return x0
        if kind == "previous_mean":
            on_x0, on_xt = self._trained_mean(t, x_t)
            return on_x0 * x0 + on_xt * x_t
        alpha, sigma = self.signal_and_noise(t, x_t)
        return alpha * eps - sigma * x0

    def _trained_mean(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of x_0 and x_t in the mean of x_{t-1} that the network was trained on, each [B, 1, 1, 1]."""
        own, step = self.trained, self.schedule.timestep_map[t]
        return own.gather(own.posterior_mean_x0, step, like), own.gather(own.posterior_mean_xt, step, like)

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor, *, threshold: Threshold | None) -> Prediction:
        """Read the network's output: the predicted quantity and, where learned, the variance, side by side.

        `threshold` bounds the implied x_0 (evaluation and sampling; None, as in training, leaves it bare), and with it
        eps and the mean. A mean that the network itself predicts stays as it is, unless the process is respaced.
        """
        output = output.to(x_t.dtype)
        value, raw_variance = output.chunk(2, dim=1) if self.variance in LEARNED else (output, None)
        x0, eps = self.x0_and_eps(self.prediction, value, x_t, t)
        if threshold is not None:
            x0 = threshold(x0)
            eps = self.x0_and_eps("x0", x0, x_t, t)[1]
        said = self.prediction == "previous_mean" and self.schedule is self.trained
        mean = value if said else self.q_posterior(x0, x_t, t)[0]
        return Prediction(mean, self._log_variance(raw_variance, x_t, t), x0, eps)

    def _log_variance(self, raw: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Log variance of p(x_{t-1} | x_t): [B, C, H, W]; `raw` is the network's second output, if it has one."""
        s = self.schedule
        smallest, largest = s.gather(s.posterior_log_variance, t, x_t), s.gather(s.log_betas, t, x_t)
        if raw is not None and self.variance == "learned":
            return raw if self.schedule is self.trained else self._translated(raw, t)
        if raw is not None:
            fraction = (raw + 1) / 2  # the network speaks in [-1, 1] (Nichol & Dhariwal 2021, eq. 15)
            return torch.lerp(smallest, largest, fraction)
        if self.variance == "fixed_small":
            return smallest.expand_as(x_t)
        # beta, with the first step's replaced by the posterior's: the published choice, for a better decoder
        return s.gather(s.fixed_large_log_variance, t, x_t).expand_as(x_t)

    def _translated(self, raw: Tensor, t: Tensor) -> Tensor:
        """A log variance of the network's own process as one of this shorter process: as far between its bounds."""
        s, own, step = self.schedule, self.trained, self.schedule.timestep_map[t]
        own_smallest = own.gather(own.posterior_log_variance, step, raw)
        own_width = own.gather(own.log_betas - own.posterior_log_variance, step, raw)
        fraction = ((raw - own_smallest) / own_width).clamp(0, 1)
        smallest, largest = s.gather(s.posterior_log_variance, t, raw), s.gather(s.log_betas, t, raw)
        first = (t == 0).view(-1, *[1] * (raw.ndim - 1))  # x_0 given x_1, in both processes
        return torch.where(first, raw, torch.lerp(smallest, largest, fraction))

    # ---- the bound ------------------------------------------------------------------------------------------------

    def kl_bits(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each image, in bits/dim: [B]."""
        true_mean, true_log_variance = self.q_posterior(x0, x_t, t)
        return mean_bits(normal_kl(true_mean, true_log_variance, prediction.mean, prediction.log_variance))

    def decoder_bits(self, prediction: Prediction, x0: Tensor) -> Tensor:
        """L_0 = -log p(x_0 | x_1) of each image, in bits/dim: [B]; of a prediction made at t = 0."""
        return -mean_bits(discretized_log_likelihood(x0, prediction.mean, 0.5 * prediction.log_variance))

    def prior_bits(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) of each image, in bits/dim: [B]. No network can change it."""
        s = self.schedule
        last = torch.full((len(x0),), self.num_timesteps - 1, device=x0.device)
        mean = s.gather(s.sqrt_alphas_cumprod, last, x0) * x0
        log_variance = s.gather(torch.log1p(-s.alphas_cumprod), last, x0)
        return mean_bits(normal_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(log_variance)))

    def vb_terms(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term of each image at its t, in bits/dim: [B]. The decoder's for t = 0, else the KL.

        Their sum over all t, plus the prior's term, is L_vlb (Ho et al. 2020, eq. 5).
        """
        kl = self.kl_bits(prediction, x0, x_t, t)
        first = t == 0
        if not first.is_cuda and not first.any():
            return kl  # the costly decoder term is not asked for; on a GPU, finding out would mean waiting
        return torch.where(first, self.decoder_bits(prediction, x0), kl)
