"""The Gaussian process against closed forms: tables, posteriors, the bound, samplers on Gaussian data."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from data_pipeline.errors import ConfigError
from trainer.config import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion, discretized_log_likelihood, normal_kl
from trainer.diffusion.objectives import training_losses
from trainer.diffusion.samplers import SAMPLERS, SampleNoise
from trainer.diffusion.schedules import cosine_betas, linear_betas, make_schedule, strided_steps

FIXED = DiffusionConfig(num_timesteps=200, variance="fixed_small", objective="simple", rescale_timesteps=False)


# ---- schedules --------------------------------------------------------------------------------------------------


def test_published_constants_of_the_schedules() -> None:
    cosine = make_schedule("cosine", 4000)
    assert int((cosine.betas == 0.999).sum()) == 1
    assert float(cosine.betas[0]) == pytest.approx(9.866e-6, rel=1e-3)
    assert float(cosine.alphas_cumprod[-1]) == pytest.approx(1.5e-10, rel=0.05)
    linear = make_schedule("linear", 4000)
    assert float(linear.alphas_cumprod[-1]) == pytest.approx(4.2e-5, rel=0.05)
    assert (linear_betas(1000)[0], linear_betas(1000)[-1]) == pytest.approx((1e-4, 0.02))
    assert cosine.betas.dtype == torch.float64


def test_linear_schedule_needs_more_than_twenty_steps() -> None:
    with pytest.raises(ConfigError, match="20"):
        linear_betas(20)
    assert linear_betas(21).max() < 1


def test_cosine_follows_its_defining_curve() -> None:
    t = np.arange(1, 100) / 100
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert np.cumprod(1 - cosine_betas(100))[:99] == pytest.approx(f, rel=1e-12)


def test_a_shorter_process_keeps_the_noise_levels_it_visits() -> None:
    steps = strided_steps(4000, 50)
    assert (len(steps), steps[0], steps[-1]) == (50, 0, 3999)
    whole, short = make_schedule("cosine", 4000), make_schedule("cosine", 4000, "cpu", steps)
    assert torch.allclose(short.alphas_cumprod, whole.alphas_cumprod[list(steps)], rtol=1e-12)
    assert short.timestep_map.tolist() == list(steps)


def test_tables_are_built_once() -> None:
    assert make_schedule("cosine", 123) is make_schedule("cosine", 123)


# ---- the process ------------------------------------------------------------------------------------------------


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


def test_eps_and_x0_are_inverses() -> None:
    process = GaussianDiffusion.create(FIXED)
    x0, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 10, 100, 190])
    x_t = process.q_sample(x0, t, noise)
    torch.testing.assert_close(process.x0_from_eps(x_t, t, noise), x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(process.eps_from_x0(x_t, t, x0), noise, rtol=1e-3, atol=2e-3)


def test_learned_variance_lies_between_its_bounds() -> None:
    process = GaussianDiffusion.create(DiffusionConfig(num_timesteps=100))
    s, t = process.schedule, torch.tensor([0, 30, 99])
    for v, bound in ((-1.0, s.posterior_log_variance), (1.0, s.log_betas)):
        output = torch.cat([torch.zeros(3, 3, 2, 2), torch.full((3, 3, 2, 2), v)], dim=1)
        found = process.predict(output, torch.zeros(3, 3, 2, 2), t, clip=False).log_variance
        torch.testing.assert_close(found[:, 0, 0, 0], bound[t].float(), rtol=1e-5, atol=1e-6)


def test_network_time_is_rescaled_and_respaced() -> None:
    config = DiffusionConfig(num_timesteps=4000)
    t = torch.tensor([0, 49])
    assert GaussianDiffusion.create(config).network_time(t).tolist() == [0.0, 49 / 4]
    short = GaussianDiffusion.create(config, "cpu", strided_steps(4000, 50))
    assert short.network_time(t).tolist() == [0.0, 3999 / 4]


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


def test_decoder_masses_of_all_levels_sum_to_one() -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, sigma in ((0.2, 0.01), (-1.0, 0.3)):
        logs = discretized_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, math.log(sigma)))
        assert float(logs.exp().sum()) == pytest.approx(1.0, abs=1e-9)


# ---- Gaussian data with its exact denoiser ----------------------------------------------------------------------

SPREAD = 0.2  # standard deviation of the data, around MEAN
MEAN = 0.1


def exact_eps(process: GaussianDiffusion, x_t: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] for x_0 ~ N(MEAN, SPREAD^2)."""
    s = process.schedule
    a, one_minus = s.gather(s.alphas_cumprod, t), 1 - s.gather(s.alphas_cumprod, t)
    return one_minus.sqrt() * (x_t - a.sqrt() * MEAN) / (a * SPREAD**2 + one_minus)


def exact_variance(process: GaussianDiffusion) -> Tensor:
    """Var(x_{t-1} | x_t) of the same data: the posterior's own, plus what x_0 leaves open given x_t. [T] float64"""
    s = process.schedule
    a = s.alphas_cumprod
    var_x0 = SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a)
    bare_posterior = s.betas * (1 - s.alphas_cumprod_prev) / (1 - a)
    return bare_posterior + s.posterior_mean_x0**2 * var_x0


def test_bound_of_gaussian_data_is_its_entropy() -> None:
    """With the exact reverse kernels nothing is lost: L_vlb is the entropy of the (discretised) data."""
    process = GaussianDiffusion.create(DiffusionConfig(num_timesteps=200, variance="fixed_small", objective="simple"))
    variance = exact_variance(process)
    generator = torch.Generator().manual_seed(0)
    shape = (64, 3, 8, 8)
    x0 = (MEAN + SPREAD * torch.randn(shape, generator=generator)).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    total = process.prior_bits(x0).mean().double()
    for step in range(process.num_timesteps):
        t = torch.full((64,), step)
        x_t = process.q_sample(x0, t, torch.randn(shape, generator=generator))
        prediction = process.predict(exact_eps(process, x_t, t), x_t, t, clip=True)
        prediction = replace(prediction, log_variance=variance[step].log().float().expand(shape))
        total += process.vb_terms(prediction, x0, x_t, t).mean()
    entropy = math.log2(SPREAD * math.sqrt(2 * math.pi * math.e) * 127.5)  # bits/dim
    assert float(total) == pytest.approx(entropy, abs=0.02)


def expected_moments(process: GaussianDiffusion, eta: float | None) -> tuple[float, float]:
    """Mean and standard deviation that a sampler must reach: every step is linear in x. `eta` None: ancestral."""
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


@pytest.mark.parametrize("num_steps", [20, 200])
@pytest.mark.parametrize(("name", "eta"), [("ancestral", None), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)])
def test_samplers_reach_the_moments_of_gaussian_data(name: str, eta: float | None, num_steps: int) -> None:
    process = GaussianDiffusion.create(FIXED, "cpu", strided_steps(200, num_steps))

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        t = torch.searchsorted(process.schedule.timestep_map, time.long())
        return exact_eps(process, x, t)

    options = {} if eta is None else {"eta": eta}
    samples = SAMPLERS[name](denoiser, SampleNoise(range(64), (3, 16, 16)), process, **options)
    mean, std = expected_moments(process, eta)
    error = std / math.sqrt(samples.numel())
    assert float(samples.mean()) == pytest.approx(mean, abs=4 * error)
    assert float(samples.std()) == pytest.approx(std, abs=4 * error)


def test_expected_moments_approach_the_data_with_more_steps() -> None:
    """So that the test above compares with the truth and not only with itself."""
    errors = []
    for steps in (100, 1000, 4000):
        config = DiffusionConfig(num_timesteps=steps, variance="fixed_small", objective="simple")
        mean, std = expected_moments(GaussianDiffusion.create(config), None)
        errors.append(abs(std - SPREAD) + abs(mean - MEAN))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.002


def test_a_samples_noise_is_its_seeds_alone() -> None:
    alone, together = SampleNoise([5], (3, 4, 4)), SampleNoise(range(8), (3, 4, 4))
    for _ in range(3):
        assert torch.equal(alone()[0], together()[5])


# ---- objectives -------------------------------------------------------------------------------------------------


def test_hybrid_trains_the_mean_by_the_mse_alone() -> None:
    config = DiffusionConfig(num_timesteps=100, vlb_weight=0.5)
    process = GaussianDiffusion.create(config)
    x0, noise, t = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4), torch.tensor([0, 5, 50, 99])
    x_t = process.q_sample(x0, t, noise)
    output = torch.randn(4, 6, 4, 4, requires_grad=True)
    losses = training_losses(process, config, output, x0=x0, x_t=x_t, t=t, noise=noise)
    assert losses.mse is not None
    assert losses.vb is not None
    torch.testing.assert_close(losses.loss, losses.mse + 0.5 * losses.vb)
    (by_vb,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    assert float(by_vb[:, :3].abs().max()) == 0.0
    assert (by_vb[:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_vlb_objective_is_t_times_the_term_and_trains_the_mean_too() -> None:
    config = DiffusionConfig(num_timesteps=100, objective="vlb")
    process = GaussianDiffusion.create(config)
    x0, noise, t = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4), torch.tensor([3, 60])
    x_t = process.q_sample(x0, t, noise)
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    losses = training_losses(process, config, output, x0=x0, x_t=x_t, t=t, noise=noise)
    expected = 100 * process.vb_terms(process.predict(output, x_t, t, clip=False), x0, x_t, t)
    torch.testing.assert_close(losses.loss, expected)
    (gradient,) = torch.autograd.grad(losses.loss.sum(), output)
    assert (gradient[:, :3].abs().amax(dim=(1, 2, 3)) > 0).all()
