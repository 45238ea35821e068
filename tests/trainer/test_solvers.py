"""The solvers: their published orders, and the mean and covariance that all of them reach.

On Gaussian data with correlated pixels and its exact denoiser, in float64: maps are known exactly (`correlated_data`),
so there is no sampling error, and what is asserted of noise is asserted of its covariance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.correlated_data import COVARIANCE, DIM, MEAN, SHAPE, affine_map, predictor_of
from benchmarks.solvers import CONTESTANTS, Contestant, on_smooth_grid, order_of
from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.samplers.inversion import ddim_inversion
from trainer.diffusion.samplers.langevin import langevin

CONFIG = DiffusionConfig(num_timesteps=1000, variance="fixed_small", objective="simple", rescale_timesteps=False)
NOTHING, EYE = torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)
ALL: list[tuple[str, dict[str, float]]] = [(name, {}) for name in SAMPLERS]
ALL += [("ddim", {"eta": 0.5}), ("ddim", {"eta": 1.0})]


def draw(num: int, seed: int) -> Tensor:
    return torch.randn(num, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- order --------------------------------------------------------------------------------------------------------


def by_rho(first: float, last: float, num: int) -> Any:
    """The grid of Karras et al. 2022 in sigma / alpha, as lambdas."""
    return -7 * np.log(np.linspace(math.exp(-first / 7), math.exp(-last / 7), num))


@pytest.mark.parametrize("grid", [np.linspace, by_rho])
@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda c: c.label)
def test_solvers_have_their_published_order(contestant: Contestant, grid: Any) -> None:
    """Lu et al. 2022b (2M, 2S, 2M SDE: 2), Karras et al. 2022 (Heun: 2), all others 1; with noise, in law."""
    found = [on_smooth_grid(contestant, num_steps, grid) for num_steps in (64, 128, 256)]
    assert order_of(found) == pytest.approx(contestant.order, abs=0.12)
    assert found[-1][1] < (0.05 if contestant.order == 1 else 1e-3)
    assert {c.name for c in CONTESTANTS} == set(SAMPLERS)


def test_first_order_solvers_are_one() -> None:
    """Euler's step is DDIM's with eta 0, and the first-order SDE step is ancestral sampling's: DDIM's with eta 1."""
    predictor = predictor_of(CONFIG, "12")
    for (one, other), options in ((("euler", "ddim"), {}), (("ancestral", "ddim"), {"eta": 1.0})):
        a, b = affine_map(one, predictor), affine_map(other, predictor, **options)
        for part in ("matrix", "shift", "added"):
            torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=1e-9, atol=1e-10)
    for second_order in ("dpmpp_2m", "dpmpp_2s", "heun"):  # with one step there is nothing to be of second order
        alone = predictor_of(CONFIG, "1")
        torch.testing.assert_close(affine_map(second_order, alone).shift, affine_map("ddim", alone).shift)


# ---- mean and covariance ------------------------------------------------------------------------------------------


def distances(found: Any) -> tuple[float, float]:
    """Of the mean and the covariance of what is made of x_T ~ N(0, I) from the data's; the covariance's relative."""
    mean, covariance = found.law(NOTHING, EYE)
    return float((mean - MEAN).norm()), float((covariance - COVARIANCE).norm() / COVARIANCE.norm())


@pytest.mark.parametrize("respacing", ["100", "quadratic100", "logsnr100", "karras100"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_all_samplers_reach_the_mean_and_the_covariance(
    name: str, options: dict[str, float], schedule: str, respacing: str
) -> None:
    """On real schedules, to the image. Second order is nearer to it."""
    config = CONFIG.model_copy(update={"schedule": schedule})
    mean, covariance = distances(affine_map(name, predictor_of(config, respacing), **options))
    assert mean < 2e-3  # of the linear schedule, whose x_T is not quite N(0, I)
    second_order = name in ("heun", "dpmpp_2m", "dpmpp_2s", "dpmpp_2m_sde") and not respacing.startswith("quadratic")
    assert covariance < (0.06 if second_order else 0.16)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_more_steps_lead_nearer(name: str, options: dict[str, float]) -> None:
    found = [distances(affine_map(name, predictor_of(CONFIG, f"logsnr{n}"), **options))[1] for n in (25, 50, 100, 200)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < (0.06 if name in ("ancestral", "ddim", "euler") else 2e-3)


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize("kind", ["x0", "v", "previous_mean"])
def test_solvers_read_every_parameterisation(kind: Any, name: str, options: dict[str, float]) -> None:
    expected = affine_map(name, predictor_of(CONFIG, "karras12"), **options)
    other = CONFIG.model_copy(update={"prediction": kind})
    found = affine_map(name, predictor_of(other, "karras12"), **options)
    for part in ("matrix", "shift", "added"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), [pair for pair in ALL if pair[0] != "ancestral"])
def test_a_learned_variance_is_the_ancestral_samplers_alone(name: str, options: dict[str, float]) -> None:
    learned = CONFIG.model_copy(update={"variance": "learned", "objective": "hybrid"})
    found, expected = (affine_map(name, predictor_of(config, "12"), **options) for config in (learned, CONFIG))
    for part in ("matrix", "shift", "added"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_float32_is_enough(name: str, options: dict[str, float]) -> None:
    """On the cosine schedule of 4000 steps, whose sigma / alpha begins at 8e4: four digits of an image."""
    config = CONFIG.model_copy(update={"num_timesteps": 4000})
    exact = predictor_of(config, "karras30")
    rounded = Predictor(lambda x, t: exact.denoiser(x.double(), t).float(), exact.diffusion, None)
    noises = [draw(16, seed) for seed in range(40)]
    expected = SAMPLERS[name](exact, draw(16, 99), noise=iter(noises).__next__, **options)
    noise = iter([z.float() for z in noises]).__next__
    found = SAMPLERS[name](rounded, draw(16, 99).float(), noise=noise, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-4)


# ---- the way back -------------------------------------------------------------------------------------------------


def test_inversion_finds_the_noise_of_an_image() -> None:
    """Latents of data are N(0, I), and a round trip's error falls as 1 / steps."""
    data = (draw(DIM, 0).flatten(1) @ torch.linalg.cholesky(COVARIANCE).T + MEAN).view(-1, *SHAPE)
    errors = []
    for num_steps in (50, 100, 200, 400):
        predictor = predictor_of(CONFIG, f"logsnr{num_steps}")
        latents = ddim_inversion(predictor, data)
        back = SAMPLERS["ddim"](predictor, latents, noise=lambda: draw(0, 0))
        errors.append((num_steps, float((back - data).norm() / data.norm())))
    assert order_of(errors) == pytest.approx(1, abs=0.1)
    assert errors[-1][1] < 0.02
    units = torch.cat([torch.zeros(1, DIM, dtype=torch.float64), EYE]).view(-1, *SHAPE)
    shift, *columns = ddim_inversion(predictor_of(CONFIG, "logsnr400"), units).flatten(1)
    matrix = (torch.stack(columns) - shift).T
    assert float((matrix @ MEAN + shift).norm()) < 1e-3
    torch.testing.assert_close(matrix @ COVARIANCE @ matrix.T, EYE, rtol=0, atol=0.05)


def test_inversion_asks_the_network_once_a_step() -> None:
    predictor, times = predictor_of(CONFIG, "10"), []

    def counted(x: Tensor, time: Tensor) -> Tensor:
        times.append(int(time[0]))
        return predictor.denoiser(x, time)

    ddim_inversion(Predictor(counted, predictor.diffusion, None), draw(2, 0))
    assert times == [0, 0, 111, 222, 333, 444, 555, 666, 777, 888]


# ---- calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", ["1", "2", "9", "10", "karras10"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_networks_are_asked_at_visited_steps_as_often_as_said(name: str, respacing: str) -> None:
    """So also with a corrector: wherever the solver arrives, but at an intermediate point of 2S or at the image."""
    predictor, times = predictor_of(CONFIG, respacing), []

    def counted(x: Tensor, time: Tensor) -> Tensor:
        times.append(int(time[0]))
        return predictor.denoiser(x, time)

    watched = Predictor(counted, predictor.diffusion, None)
    schedule = predictor.diffusion.schedule
    for steps, stop in ((0, 0), (3, 0), (3, 1)):
        if stop > int(schedule.timestep_map[-1]):
            continue
        times.clear()
        corrector = langevin(steps, 0.16) if steps else None
        SAMPLERS[name](watched, draw(2, 0), noise=lambda: draw(2, 1), stop=stop, corrector=corrector)
        assert len(times) == SAMPLERS[name].num_calls(schedule, stop=stop, corrector_steps=steps)
        assert set(times) <= set(schedule.timestep_map.tolist())
        assert times == sorted(times, reverse=True)


def test_calls_by_hand() -> None:
    ten, nine = (predictor_of(CONFIG, n).diffusion.schedule for n in ("10", "9"))
    calls = {name: (SAMPLERS[name].num_calls(ten), SAMPLERS[name].num_calls(nine)) for name in SAMPLERS}
    assert calls.pop("heun") == (18, 16)  # Euler's in the first step, from sigma / alpha = 2e4, and in the last
    assert set(calls.values()) == {(10, 9)}
    assert SAMPLERS["ddim"].num_calls(ten, corrector_steps=2) == 10 + 2 * 9
    assert SAMPLERS["dpmpp_2s"].num_calls(ten, corrector_steps=2) == 10 + 2 * 5  # arrives at 7, 5, 3, 1 and 0
    assert SAMPLERS["ddim"].num_calls(ten, stop=500) == 4  # leaves 999, 888, 777 and 666


# ---- the corrector ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [0.16, 0.3])
@pytest.mark.parametrize("start", [0.25, 4.0])
def test_langevin_steps_lead_to_the_law_of_their_level(start: float, snr: float) -> None:
    """From too little or too much variance, to what theory says of steps of this size.

    For many independent pixels of variance v, a step of size s = 2 alpha (snr * v)² / var multiplies the deviation by
    1 - s / v and adds 2 s: its fixed point is var = (1 + alpha snr²) v.
    """
    process = GaussianDiffusion.create(CONFIG, respacing="20")
    level, before = process.schedule.level(10), process.trained.level(process.schedule.original(10) - 1)
    alpha, variance = level.alpha_cumprod / before.alpha_cumprod, (0.3 * level.alpha) ** 2 + level.sigma**2

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        return level.sigma * (x - 0.1) / variance  # eps of x ~ N(0.1, variance)

    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(64, 3, 32, 32, generator=generator)

    x = 0.1 + math.sqrt(start * variance) * noise()
    x = langevin(60 if snr > 0.2 else 150, snr)(Predictor(denoiser, process, None), x, 10, noise)
    error = math.sqrt(2 / x.numel())
    assert float((x - 0.1).square().mean() / variance) == pytest.approx(1 + alpha * snr**2, abs=4 * error)
    assert float(x.mean()) == pytest.approx(0.1, abs=4 * math.sqrt(variance / x.numel()))


@pytest.mark.parametrize(("name", "options"), ALL)
def test_corrected_samplers_reach_the_mean_and_the_covariance(name: str, options: dict[str, float]) -> None:
    """Of images of many independent parts: |z| / |score| is nearly the same for all, as it is for large images."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(100, 200 * DIM, 1, 1, dtype=torch.float64, generator=generator)

    predictor = predictor_of(CONFIG, "100")
    x = SAMPLERS[name](predictor, noise(), noise=noise, corrector=langevin(1, 0.16), **options).reshape(-1, DIM)
    assert float((x.mean(dim=0) - MEAN).norm()) < 4 * math.sqrt(float(COVARIANCE.trace()) / len(x))
    assert float((x.T.cov() - COVARIANCE).norm() / COVARIANCE.norm()) < 0.1  # 0.03 of it the size of Langevin steps


def test_a_corrected_image_is_its_own_noise_alone() -> None:
    """Norms are of each image, not of the batch."""
    predictor, x, z = predictor_of(CONFIG, "10"), draw(4, 0), draw(4, 1)
    x[1] *= 100
    together = langevin(1, 0.16)(predictor, x, 5, lambda: z)
    alone = langevin(1, 0.16)(predictor, x[:1], 5, lambda: z[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)


def test_an_image_without_a_score_is_left_alone() -> None:
    process = GaussianDiffusion.create(CONFIG, respacing="10")
    x = draw(2, 0)
    assert torch.equal(langevin(2, 0.16)(Predictor(lambda x, _: 0 * x, process, None), x, 5, lambda: draw(2, 1)), x)
