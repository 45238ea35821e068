"""DPM-Solver++ of second order (Lu et al. 2022b): the network's x_0 integrated over lambda = log(alpha / sigma).

From level s to t, with h = lambda_t - lambda_s, the ODE's solution is

    x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - exp(-h)) x_0

for an x_0 that stays what it is (order 1: DDIM's step), and the SDE's

    x_t = (sigma_t / sigma_s) exp(-h) x_s + alpha_t (1 - exp(-2h)) x_0 + sigma_t sqrt(1 - exp(-2h)) noise

(order 1: ancestral sampling with the variance beta-tilde). Order 2 takes x_0 along the line through two predictions.
The step to the image, where h is infinite, is of order 1 and gives x_0.
"""

from __future__ import annotations

import math

from torch import Tensor

from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers.sampler import Noise, Solver
from trainer.diffusion.schedules import Level


def dpmpp_2m(predictor: Predictor, noise: Noise) -> Solver:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: the second prediction is that of the step before."""
    x0_of, level = _extrapolating(predictor), predictor.diffusion.schedule.level
    return lambda x, start, end: _ode_step(x, x0_of(x, start, end), level(start), level(end))


def dpmpp_2m_sde(predictor: Predictor, noise: Noise) -> Solver:
    """SDE-DPM-Solver++(2M), ibid.: the same line in the reverse SDE, with noise at every step."""
    x0_of, level = _extrapolating(predictor), predictor.diffusion.schedule.level

    def solve(x: Tensor, start: int, end: int) -> Tensor:
        x0, here, there = x0_of(x, start, end), level(start), level(end)
        if end < 0:
            return x0
        h = there.half_logsnr - here.half_logsnr
        x = there.sigma / here.sigma * math.exp(-h) * x - there.alpha * math.expm1(-2 * h) * x0
        return x + there.sigma * math.sqrt(-math.expm1(-2 * h)) * noise()

    return solve


def dpmpp_2s(predictor: Predictor, noise: Noise) -> Solver:
    """DPM-Solver++(2S), ibid., algorithm 1: the second prediction is made at a visited step between the two levels.

    Where the levels are neighbours (an odd one at the end, the image) the step is of order 1.
    """
    level = predictor.diffusion.schedule.level

    def solve(x: Tensor, start: int, end: int) -> Tensor:
        here, there, x0 = level(start), level(end), predictor(x, start).x0
        if start - end == 2:
            between = level(start - 1)
            second = predictor(_ode_step(x, x0, here, between), start - 1).x0
            r = (between.half_logsnr - here.half_logsnr) / (there.half_logsnr - here.half_logsnr)
            x0 = x0 + (second - x0) / (2 * r)
        return _ode_step(x, x0, here, there)

    return solve


def _ode_step(x: Tensor, x0: Tensor, here: Level, there: Level) -> Tensor:
    h = there.half_logsnr - here.half_logsnr
    return there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * x0


def _extrapolating(predictor: Predictor) -> Solver:
    """x_0 in the middle of a step from one level to another, on the line through this and the last prediction.

    The first step of all, and the one to the image, have this prediction alone.
    """
    level = predictor.diffusion.schedule.level
    last: tuple[Tensor, float] | None = None  # the prediction before, and the lambda that it was made at

    def x0_of(x: Tensor, start: int, end: int) -> Tensor:
        nonlocal last
        here, x0, before = level(start).half_logsnr, predictor(x, start).x0, last
        last = x0, here
        if before is None or end < 0:
            return x0
        r = (here - before[1]) / (level(end).half_logsnr - here)
        return x0 + (x0 - before[0]) / (2 * r)

    return x0_of
