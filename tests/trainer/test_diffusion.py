"""The Gaussian process against closed forms: posteriors, parameterisations, the terms of the bound."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gaussian_data import MEAN, SPREAD, exact_output, second_output
from scipy import integrate, stats
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig, Quantity
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.likelihoods import discretized_log_likelihood, normal_kl
from trainer.diffusion.thresholding import static

FIXED = DiffusionConfig(num_timesteps=200, variance="fixed_small", objective="simple", rescale_timesteps=False)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def noised(process: GaussianDiffusion, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_0, noise, x_t) in float64: [len(t), 3, 4, 4]."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(len(t), 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return x0, noise, process.q_sample(x0, t, noise)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) as the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), for scalars."""
    process = GaussianDiffusion.create(FIXED)
    s = process.schedule
    x0, x_t = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -0.7)
    for step in (1, 50, 199):
        beta, before = float(s.betas[step]), float(s.alphas_cumprod_prev[step])
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (math.sqrt(1 - beta) / beta * -0.7 + math.sqrt(before) / (1 - before) * 0.3) / precision
        found_mean, found_log_variance = process.q_posterior(x0, x_t, torch.tensor([step]))
        assert float(found_mean) == pytest.approx(mean, rel=1e-5)
        assert float(found_log_variance) == pytest.approx(-math.log(precision), rel=1e-5)


def test_network_time_is_rescaled_and_respaced() -> None:
    config = DiffusionConfig(num_timesteps=4000)
    t = torch.tensor([0, 49])
    assert GaussianDiffusion.create(config).network_time(t).tolist() == [0.0, 49 / 4]
    short = GaussianDiffusion.create(config, "cpu", "50")
    assert short.network_time(t).tolist() == [0.0, 3999 / 4]


# ---- parameterisations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("kind", QUANTITIES)
def test_every_quantity_gives_back_x0_and_eps(kind: Quantity, schedule: Any) -> None:
    process = GaussianDiffusion.create(DiffusionConfig(num_timesteps=1000, schedule=schedule))
    t = torch.tensor([0, 1, 10, 500, 990, 999])
    x0, noise, x_t = noised(process, t)
    value = process.quantity(kind, x0, noise, x_t, t)
    found_x0, found_eps = process.x0_and_eps(kind, value, x_t, t)
    # What is lost is float64's rounding times the noise-to-signal ratio (x_0) or the signal-to-noise ratio (eps).
    alpha, sigma = process.signal_and_noise(t, x0)
    assert ((found_x0 - x0).abs() <= 1e-13 * (1 + sigma / alpha)).all()
    assert ((found_eps - noise).abs() <= 1e-13 * (1 + alpha / sigma)).all()


@pytest.mark.parametrize("kind", QUANTITIES)
def test_all_parameterisations_mean_the_same(kind: Quantity) -> None:
    """The right output of each kind of network leads to the posterior at the true x_0."""
    config = FIXED.model_copy(update={"prediction": kind})
    process, t = GaussianDiffusion.create(config), torch.tensor([0, 3, 100, 199])
    x0, noise, x_t = noised(process, t)
    for clip in (False, True):  # the true x_0 is within bounds
        found = process.predict(process.quantity(kind, x0, noise, x_t, t), x_t, t, threshold=static if clip else None)
        torch.testing.assert_close(found.mean, process.q_posterior(x0, x_t, t)[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.eps, noise, rtol=0, atol=1e-10)


def test_v_is_the_velocity_along_the_circle() -> None:
    """With x_t = cos(a) x_0 + sin(a) eps, v is the derivative in the angle a."""
    process, t = GaussianDiffusion.create(FIXED), torch.tensor([20, 150])
    x0, noise, x_t = noised(process, t)
    alpha, sigma = process.signal_and_noise(t, x0)
    angle, step = torch.atan2(sigma, alpha), 1e-6
    ahead = torch.cos(angle + step) * x0 + torch.sin(angle + step) * noise
    torch.testing.assert_close(process.quantity("v", x0, noise, x_t, t), (ahead - x_t) / step, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTITIES)
def test_clipping_bounds_x0_and_keeps_eps_consistent(kind: Quantity) -> None:
    config = FIXED.model_copy(update={"prediction": kind})
    process, t = GaussianDiffusion.create(config), torch.tensor([5, 150])
    x0, noise, x_t = noised(process, t)
    output = process.quantity(kind, 3 * x0, noise, x_t, t)
    found = process.predict(output, x_t, t, threshold=static)
    bounded = process.predict(output, x_t, t, threshold=None).x0.clamp(-1, 1)
    torch.testing.assert_close(found.x0, bounded)
    alpha, sigma = process.signal_and_noise(t, x_t)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x_t)
    expected = output if kind == "previous_mean" else process.q_posterior(bounded, x_t, t)[0]
    torch.testing.assert_close(found.mean, expected)


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_the_output_is_read_in_the_images_type(variance: Any) -> None:
    process, t = GaussianDiffusion.create(DiffusionConfig(num_timesteps=100, variance=variance)), torch.tensor([5, 50])
    x_t, output = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    for images, said in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32)):
        found = process.predict(output.to(said), x_t.to(images), t, threshold=static)
        assert {tensor.dtype for tensor in vars(found).values()} == {images}


def test_variances() -> None:
    t, x = torch.tensor([0, 30, 99]), torch.zeros(3, 3, 2, 2)

    def log_variance(variance: Any, second: float | None = None) -> Tensor:
        config = DiffusionConfig(num_timesteps=100, variance=variance, objective="simple" if second is None else "vlb")
        output = x if second is None else torch.cat([x, torch.full_like(x, second)], dim=1)
        found = GaussianDiffusion.create(config).predict(output, x, t, threshold=None).log_variance
        assert found.shape == x.shape
        return found[:, 0, 0, 0]

    s = GaussianDiffusion.create(DiffusionConfig(num_timesteps=100)).schedule
    small, large = s.posterior_log_variance[t].float(), s.log_betas[t].float()
    assert float(small[0]) == pytest.approx(float(s.posterior_log_variance[1]))  # the first step's would be log 0
    torch.testing.assert_close(log_variance("learned_range", -1.0), small, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_variance("learned_range", 1.0), large, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_variance("learned_range", 0.5), 0.25 * small + 0.75 * large)
    torch.testing.assert_close(log_variance("learned", -3.25), torch.full((3,), -3.25))
    torch.testing.assert_close(log_variance("fixed_small"), small)
    torch.testing.assert_close(log_variance("fixed_large"), torch.cat([small[:1], large[1:]]))


def test_normal_kl() -> None:
    kl = normal_kl(torch.tensor(0.2), torch.tensor(0.5), torch.tensor(-0.1), torch.tensor(-0.3))
    expected = 0.5 * (-0.3 - 0.5 + math.exp(0.8) - 1 + 0.09 * math.exp(0.3))
    assert float(kl) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", [0, 1, 127, 200, 254, 255])
@pytest.mark.parametrize(("mean", "sigma"), [(-0.9, 0.003), (0.1, 0.02), (0.99, 0.5), (0.0, 3.0)])
def test_decoder_term_is_the_gaussian_mass_of_the_bin(level: int, mean: float, sigma: float) -> None:
    x = level / 127.5 - 1
    low = -math.inf if level == 0 else x - 1 / 255
    high = math.inf if level == 255 else x + 1 / 255
    found = float(
        discretized_log_likelihood(
            torch.tensor(x, dtype=torch.float64), torch.tensor(mean).double(), torch.tensor(math.log(sigma)).double()
        )
    )
    a, b = (low - mean) / sigma, (high - mean) / sigma
    if min(abs(a), abs(b)) < 30:  # where quadrature in double precision can follow
        mass, _ = integrate.quad(stats.norm.pdf, max(a, -38), min(b, 38), points=[0] if a < 0 < b else None, epsabs=0)
        assert found == pytest.approx(math.log(mass), rel=1e-6)
    assert math.isfinite(found)
    assert found <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_term_at_every_scale(dtype: torch.dtype) -> None:
    """From a thousandth of a bin to 1e13 of them, float32 as well: within its rounding, gradients finite."""
    log_scale = torch.linspace(-12, 30, 200, dtype=torch.float64).repeat(40)
    x = torch.tensor([-0.6, 0.0, 1 / 127.5, 0.9], dtype=torch.float64).repeat_interleave(2000)
    mean = x + torch.linspace(-3, 3, 8000, dtype=torch.float64) * log_scale.exp().clamp(max=1)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, mean, log_scale)]
    found = discretized_log_likelihood(*inputs)
    # The truth for the rounded inputs: tails as logs where the bin is wide, the midpoint rule where it is narrow.
    level, center, scale = (tensor.detach().double().numpy() for tensor in inputs)
    half, distance = np.exp(-scale) / 255, np.abs(level - center) * np.exp(-scale)
    a, b = stats.norm.logcdf(-distance - half), stats.norm.logcdf(-distance + half)
    wide = b + np.log(-np.expm1(np.minimum(a - b, -1e-300)))
    middle = stats.norm.logpdf(distance) + np.log(2 * half) + (distance**2 - 1) * half**2 / 6
    truth = torch.from_numpy(np.where(half < 1e-4, middle, wide))
    error = ((found - truth).abs() / truth.abs().clamp(min=1)).max()
    assert error < (2e-5 if dtype == torch.float32 else 1e-10)
    for gradient in torch.autograd.grad(found.sum(), inputs):
        assert torch.isfinite(gradient).all()


def test_decoder_masses_of_all_levels_sum_to_one() -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, sigma in ((0.2, 0.01), (-1.0, 0.3)):
        logs = discretized_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, math.log(sigma)))
        assert float(logs.exp().sum()) == pytest.approx(1.0, abs=1e-9)


# ---- the bound of Gaussian data ---------------------------------------------------------------------------------


def bound_of_gaussian_data(process: GaussianDiffusion, second: Tensor | None) -> tuple[float, float]:
    """(L_vlb with the perfect network, true NLL) of the same grey levels, bits/dim.

    `second` [T] is the network's second output, if it has one.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (256, 3, 8, 8)
    x0 = (MEAN + SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    total = float(process.prior_bits(x0).mean())
    for step in range(process.num_timesteps):
        t = torch.full((len(x0),), step)
        x_t = process.q_sample(x0, t, torch.randn(shape, generator=generator, dtype=torch.float64))
        output = exact_output(process, process.prediction, x_t, t)
        if second is not None:
            output = torch.cat([output, second[step].expand_as(x_t)], dim=1)
        prediction = process.predict(output, x_t, t, threshold=None)
        term = float(process.vb_terms(prediction, x0, x_t, t).mean())
        apart = process.decoder_bits(prediction, x0) if step == 0 else process.kl_bits(prediction, x0, x_t, t)
        assert term == pytest.approx(float(apart.mean()), rel=1e-12)
        total += term
    mass = stats.norm.cdf(x0 + 1 / 255, MEAN, SPREAD) - stats.norm.cdf(x0 - 1 / 255, MEAN, SPREAD)
    return total, -float(np.log2(mass).mean())


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("kind", QUANTITIES)
def test_bound_of_the_exact_network_is_the_likelihood(kind: Quantity, variance: Any) -> None:
    """With the exact reverse kernels nothing is lost."""
    process = GaussianDiffusion.create(DiffusionConfig(num_timesteps=200, prediction=kind, variance=variance))
    bound, likelihood = bound_of_gaussian_data(process, second_output(process))
    assert bound == pytest.approx(likelihood, abs=0.01)  # two standard errors of the drawn noise


def test_fixed_variances_bound_the_likelihood_from_above() -> None:
    """A variance that is not the exact one costs bits; beta is nearer to it than beta-tilde, the more so the finer."""
    gaps: dict[str, list[float]] = {"fixed_small": [], "fixed_large": []}
    for variance, found in gaps.items():
        for steps in (25, 100, 400):
            config = DiffusionConfig(num_timesteps=steps, variance=variance, objective="simple")  # type: ignore[arg-type]
            bound, likelihood = bound_of_gaussian_data(GaussianDiffusion.create(config), None)
            found.append(bound - likelihood)
    assert min(gaps["fixed_large"]) > 0.05
    assert all(small > large for small, large in zip(gaps["fixed_small"], gaps["fixed_large"], strict=True))
    assert gaps["fixed_large"][0] > gaps["fixed_large"][1] > gaps["fixed_large"][2]
