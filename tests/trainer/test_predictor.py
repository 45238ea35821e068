"""What a sampler asks at a step: thresholds, a classifier's score, and ends before the image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian_data import MEAN, SPREAD, exact_denoiser, expected_x0
from torch import Tensor

from data_pipeline.errors import ConfigError
from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.predictor import Predictor, Score
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.thresholding import dynamic, static
from trainer.sample_noise import SampleNoise

CONFIG = DiffusionConfig(num_timesteps=1000, variance="learned", rescale_timesteps=False)
SEEN, DOUBT = 0.4, 0.3  # every pixel was observed as SEEN, with an error of standard deviation DOUBT


def test_dynamic_thresholding_is_by_each_images_quantile() -> None:
    x0 = 3 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0[1] *= 0.1  # within the range: stays as it is
    for quantile in (0.5, 0.9, 0.995, 1.0):
        s = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        found = dynamic(quantile)(x0)
        torch.testing.assert_close(found, torch.minimum(torch.maximum(x0, -s), s) / s, rtol=0, atol=1e-12)
        assert found.abs().max() <= 1
        assert torch.equal(found[1], static(x0[1])) == (quantile == 1.0 or bool(s[1] == 1))


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "previous_mean"])
@pytest.mark.parametrize("threshold", [None, static, dynamic(0.9)])
def test_a_prediction_is_bounded_as_told(kind: Any, threshold: Any) -> None:
    process = GaussianDiffusion.create(CONFIG.model_copy(update={"prediction": kind}), "cpu", "10")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = torch.cat([x.flip(2) * 3, x], dim=1)
    bare = process.predict(output, x, torch.tensor([4, 4]), threshold=None)
    found = Predictor(lambda *_: output, process, threshold)(x, 4)
    torch.testing.assert_close(found.x0, bare.x0 if threshold is None else threshold(bare.x0))
    alpha, sigma = process.signal_and_noise(torch.tensor([4, 4]), x)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x)


# ---- guidance by a classifier -----------------------------------------------------------------------------------


def exact_score(whole: GaussianDiffusion) -> Score:
    """The gradient of log p(SEEN | x_t), where x_0 is Gaussian given x_t."""

    def score(x: Tensor, time: Tensor) -> Tensor:
        t = time.long()
        alpha, sigma = whole.signal_and_noise(t, x)
        slope = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        left_open = SPREAD**2 * (1 - slope * alpha)  # Var(x_0 | x_t)
        return slope * (SEEN - expected_x0(whole, x, t)) / (left_open + DOUBT**2)

    return score


def test_a_wrong_score_at_almost_pure_noise_is_not_magnified() -> None:
    """What a trained classifier says there is never exactly zero; the linear schedule is guided from its first step."""
    for schedule, is_guided in (("cosine", False), ("linear", True)):
        config = CONFIG.model_copy(update={"schedule": schedule})
        process = GaussianDiffusion.create(config, "cpu", "50")
        plain = Predictor(exact_denoiser(config), process, None)
        wrong = Predictor(exact_denoiser(config), process, None, lambda x, _: 0.1 * torch.ones_like(x))
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(wrong(x, 49).x0, plain(x, 49).x0) != is_guided
        assert not torch.equal(wrong(x, 45).x0, plain(x, 45).x0)
        noise = SampleNoise(range(2), (3, 4, 4))
        images = SAMPLERS["ddim"](wrong, noise(), noise=noise)
        assert images.abs().max() < 2


@pytest.mark.parametrize(("name", "options"), [("ancestral", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0})])
def test_a_score_turns_samples_of_the_data_into_samples_given_what_was_seen(name: str, options: Any) -> None:
    """Algorithm 1 (ancestral) and 2 of Dhariwal & Nichol reach the posterior of Gaussian data, by Bayes' rule."""
    process = GaussianDiffusion.create(CONFIG)
    noise = SampleNoise(range(16), (3, 16, 16))
    predictor = Predictor(exact_denoiser(CONFIG), process, None, exact_score(process))
    samples = SAMPLERS[name](predictor, noise().double(), noise=lambda: noise().double(), **options)
    precision = 1 / SPREAD**2 + 1 / DOUBT**2
    mean, std = (MEAN / SPREAD**2 + SEEN / DOUBT**2) / precision, precision**-0.5
    error = std / math.sqrt(samples.numel())
    assert float(samples.mean()) == pytest.approx(mean, abs=4 * error + 0.002)  # 0.002: a thousand steps, not all
    assert float(samples.std()) == pytest.approx(std, abs=4 * error + 0.002)


def test_the_two_algorithms_are_theirs() -> None:
    process = GaussianDiffusion.create(CONFIG, "cpu", "10")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    score = exact_score(GaussianDiffusion.create(CONFIG))
    bare, guided = (Predictor(exact_denoiser(CONFIG), process, static, s) for s in (None, score))
    plain, t = bare(x, 6), torch.tensor([6, 6])
    gradient = score(x, process.network_time(t))
    second, first = guided(x, 6), guided.with_shifted_mean(x, 6)
    alpha, sigma = process.signal_and_noise(t, x)
    torch.testing.assert_close(second.eps, plain.eps - sigma * gradient)
    torch.testing.assert_close(alpha * second.x0 + sigma * second.eps, x)
    torch.testing.assert_close(second.mean, process.q_posterior(second.x0, x, t)[0])
    torch.testing.assert_close(first.mean, plain.mean + plain.log_variance.exp() * gradient)
    assert torch.equal(first.x0, plain.x0)
    assert torch.equal(bare.with_shifted_mean(x, 6).mean, plain.mean)


# ---- ends before the image --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(("stop", "level"), [(0, -1), (1, 1), (111, 1), (112, 2), (998, 9), (999, 9)])
def test_a_sampler_stops_at_the_level_asked_for(name: str, stop: int, level: int) -> None:
    """There x has the moments of x_t, and no call was made that was not needed."""
    process = GaussianDiffusion.create(CONFIG, "cpu", "10")
    assert process.schedule.timestep_map.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert process.schedule.last_step(stop) == level
    exact, calls = exact_denoiser(CONFIG), []

    def counted(x: Tensor, time: Tensor) -> Tensor:
        calls.append(time)
        return exact(x, time)

    noise = SampleNoise(range(16), (3, 16, 16))
    samples = SAMPLERS[name](Predictor(counted, process, None), noise(), noise=noise, stop=stop)
    assert len(calls) == SAMPLERS[name].num_calls(process.schedule, stop=stop)
    if level >= 0:
        there = process.schedule.level(level)
        std = math.hypot(there.alpha * SPREAD, there.sigma)
        assert float(samples.mean()) == pytest.approx(there.alpha * MEAN, abs=0.05)
        assert float(samples.std()) == pytest.approx(std, abs=0.05)


def test_there_is_nothing_to_stop_at_above_all_steps() -> None:
    schedule = GaussianDiffusion.create(CONFIG, "cpu", "ddim10").schedule
    assert schedule.last_step(900) == 9
    for stop in (901, -1):
        with pytest.raises(
            ConfigError, match=rf"stop={stop}: the last visited step is 900; use 0 \(the image\) to 900"
        ):
            schedule.last_step(stop)
