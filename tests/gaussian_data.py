"""Data that diffusion can be solved for by hand: every pixel is N(MEAN, SPREAD²), independent of the others.

The best denoiser, the exact reverse kernels and the moments that a sampler must reach are then closed forms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig, Quantity
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion

SPREAD = 0.2
MEAN = 0.1


def expected_x0(process: GaussianDiffusion, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t]."""
    alpha, sigma = process.signal_and_noise(t, x_t)
    return MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x_t - alpha * MEAN)


def exact_output(process: GaussianDiffusion, kind: Quantity, x_t: Tensor, t: Tensor) -> Tensor:
    """What a perfect network says that predicts `kind`: its expectation given x_t."""
    alpha, sigma = process.signal_and_noise(t, x_t)
    x0 = expected_x0(process, x_t, t)
    return process.quantity(kind, x0, (x_t - alpha * x0) / sigma, x_t, t)


def exact_denoiser(config: DiffusionConfig) -> Denoiser:
    """The perfect network for a config, as samplers call it on whatever respacing.

    It was trained on all T steps: it knows no other process.
    """
    whole = GaussianDiffusion.create(config)
    second = second_output(whole)

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        t = time.long()
        assert torch.equal(t.float(), time), "meant for rescale_timesteps=false"
        output = exact_output(whole, config.prediction, x, t)
        if second is None:
            return output
        return torch.cat([output, whole.schedule.gather(second, t, x).expand_as(x)], dim=1)

    return denoiser


def second_output(process: GaussianDiffusion) -> Tensor | None:
    """What a perfect network says of the variance: [T] float64; None where the variance is fixed."""
    log_variance, s = exact_variance(process).log(), process.schedule
    if process.variance == "learned":
        return log_variance
    if process.variance == "learned_range":
        within = (log_variance - s.posterior_log_variance) / (s.log_betas - s.posterior_log_variance)
        assert ((within >= 0) & (within <= 1)).all()  # so that it can be said
        return 2 * within - 1
    return None


def exact_variance(process: GaussianDiffusion) -> Tensor:
    """Var(x_{t-1} | x_t): the posterior's own, plus what x_0 leaves open given x_t. [T] float64"""
    s = process.schedule
    a = s.alphas_cumprod
    var_x0 = SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a)
    bare_posterior = s.betas * (1 - s.alphas_cumprod_prev) / (1 - a)
    return bare_posterior + s.posterior_mean_x0**2 * var_x0


def sampled_moments(process: GaussianDiffusion, eta: float | None) -> tuple[float, float]:
    """Mean and standard deviation that a sampler must reach: each step is linear in x. `eta` None: ancestral."""
    s = process.schedule
    mean, variance = 0.0, 1.0
    for step in reversed(range(process.num_timesteps)):
        a, before = float(s.alphas_cumprod[step]), float(s.alphas_cumprod_prev[step])
        slope = math.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a)  # of E[x_0 | x_t]
        x0_slope, x0_bias = slope, MEAN * (1 - slope * math.sqrt(a))
        if eta is None:
            on_x0, on_x = float(s.posterior_mean_x0[step]), float(s.posterior_mean_xt[step])
            noise = float(s.posterior_log_variance[step].exp()) if step > 0 else 0.0
        else:
            beta = 1 - a / before
            noise = eta**2 * beta * (1 - before) / (1 - a)  # eta^2 times beta-tilde
            on_x = math.sqrt(1 - before - noise) / math.sqrt(1 - a)
            on_x0 = math.sqrt(before) - on_x * math.sqrt(a)
        factor = on_x + on_x0 * x0_slope
        mean, variance = factor * mean + on_x0 * x0_bias, factor**2 * variance + noise
    return mean, math.sqrt(variance)
