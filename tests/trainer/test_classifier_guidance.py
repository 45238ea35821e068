"""Guidance by a classifier: its gradient, and the distributions that it is known to lead to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian_data import MEAN, SPREAD, exact_denoiser
from mixture_data import MEANS, SHAPE, Exact
from mixture_data import SPREAD as CLASS_SPREAD
from torch import Tensor

from trainer.conditions import Conditions
from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.classifier_guidance import classifier_score
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.guidance import guided
from trainer.diffusion.predictor import Predictor, Score
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.thresholding import dynamic

CONFIG = DiffusionConfig(num_timesteps=1000, objective="simple", variance="fixed_small", rescale_timesteps=False)
NUM = 4096  # samples
WAYS: list[Any] = [("ancestral", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0})]
LABELS = torch.arange(NUM) % 2


def draw(
    name: str, denoiser: Denoiser, score: Score | None = None, *, respacing: str = "250", **options: Any
) -> Tensor:  # fmt: skip
    """Samples [NUM, *SHAPE] in float64."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(NUM, *SHAPE, dtype=torch.float64, generator=generator)

    process = GaussianDiffusion.create(CONFIG, "cpu", respacing)
    return SAMPLERS[name](Predictor(denoiser, process, None, score), noise(), noise=noise, **options)


def agree(samples: Tensor, mean: Tensor | float, std: float, *, bias: float) -> None:
    """Mean and standard deviation of each pixel, to four standard errors and what finitely many steps leave."""
    error = std / len(samples) ** 0.5
    assert float((samples.mean(dim=0) - mean).abs().max()) < 4 * error + bias
    assert float((samples.std(dim=0) - std).abs().max()) < 4 * error + bias


def test_the_score_is_the_gradient() -> None:
    """By finite differences, where gradients are switched off, and each image's by itself."""
    exact, labels, time = Exact(CONFIG), torch.tensor([0, 1, 1]), torch.tensor([3.0, 200.0, 700.0])
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = classifier_score(exact.classifier, labels, scale=2.5)(x, time)

        def log_p(values: Tensor) -> Tensor:
            return exact.classifier(values, time).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]

        for pixel in range(2):
            step = torch.zeros_like(x)
            step[..., pixel] = 1e-5
            slope = (log_p(x + step) - log_p(x - step)) / 2e-5
            torch.testing.assert_close(found[:, 0, 0, pixel], 2.5 * slope, rtol=1e-6, atol=1e-8)
    assert not found.requires_grad
    assert not x.requires_grad


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_bayes_rule(name: str, options: Any) -> None:
    """Both algorithms: a network that knows no class and a classifier make the samples of a class."""
    exact = Exact(CONFIG)
    samples = draw(name, exact.network, classifier_score(exact.classifier, LABELS, scale=1.0), **options)
    for label, mean in enumerate(MEANS):
        agree(samples[label == LABELS], mean, CLASS_SPREAD, bias=0.005)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(("name", "options"), WAYS)
def test_a_scale_is_a_power_of_the_classifier(name: str, options: Any, scale: float) -> None:
    """Where log p(y | x) is linear, p(x) p(y | x)^s is a Gaussian, moved: exact for every s.

    Of pixels N(m, v) and log p(y | x_0) = b x_0, x_t has log p(y | x_t) = b E[x_0 | x_t], which is linear too.
    """
    process, slope = GaussianDiffusion.create(CONFIG), 2.0

    def linear(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = process.signal_and_noise(time.long(), x)
        says = (slope * alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x).flatten(1).sum(dim=1)
        return torch.stack([says - 1000, torch.zeros_like(says)], dim=1)  # so rare that log p is linear

    score = classifier_score(linear, torch.zeros(NUM, dtype=torch.long), scale=scale)
    # A shifted mean is right for small steps only: at scale 3 samples are 0.018 off in 250 steps, 0.006 in 1000.
    steps = "1000" if name == "ancestral" and scale > 1 else "250"
    samples = draw(name, exact_denoiser(CONFIG), score, respacing=steps, **options)
    agree(samples, MEAN + scale * slope * SPREAD**2, SPREAD, bias=0.006)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("threshold", [None, dynamic(0.9)])
def test_without_a_classifier_it_is_the_same(kind: Any, threshold: Any) -> None:
    """The best network of a class is the one without, guided by the best classifier: guidance either way is one."""
    exact = Exact(CONFIG.model_copy(update={"prediction": kind}))
    for scale in (0.0, 1.0, 2.5):
        free = guided(exact.network, Conditions(labels=LABELS), scale=scale, learns_variance=False)
        by_network = predicted(free, None, kind, threshold)
        if threshold is None:  # a bound on x_0 comes before the classifier, and after the network's own guidance
            score = classifier_score(exact.classifier, LABELS, scale=scale)
            torch.testing.assert_close(by_network, predicted(exact.network, score, kind, None), rtol=0, atol=1e-9)
            if scale:
                score = classifier_score(exact.classifier, LABELS, scale=scale - 1)
                of_class = guided(exact.network, Conditions(labels=LABELS), scale=1.0, learns_variance=False)
                torch.testing.assert_close(by_network, predicted(of_class, score, kind, None), rtol=0, atol=1e-9)
        else:
            bare = predicted(free, None, kind, None)
            torch.testing.assert_close(by_network, threshold(bare), rtol=0, atol=1e-9)


def predicted(denoiser: Denoiser, score: Score | None, kind: Any, threshold: Any) -> Tensor:
    """x_0 as it is predicted at one step."""
    process = GaussianDiffusion.create(CONFIG.model_copy(update={"prediction": kind}), "cpu", "10")
    x = torch.randn(NUM, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Predictor(denoiser, process, threshold, score)(x, 4).x0


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_of_gaussian_data(scale: float) -> None:
    """Where a class moves a Gaussian and no more, its samples are moved as many times as far."""
    process, move = GaussianDiffusion.create(CONFIG), 0.15

    def network(x: Tensor, time: Tensor, labels: Tensor | None, *_: Tensor | None) -> Tensor:
        """The classes' pixels are N(MEAN + move, SPREAD²); without a class N(MEAN, SPREAD²)."""
        assert labels is not None
        mean = MEAN + move * (labels >= 0).double().view(-1, 1, 1, 1)
        alpha, sigma = process.signal_and_noise(time.long(), x)
        return sigma * (x - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)

    denoiser = guided(network, Conditions(labels=LABELS), scale=scale, learns_variance=False)
    for name, options in WAYS:
        agree(draw(name, denoiser, **options), MEAN + scale * move, SPREAD, bias=0.006)
