"""The probability-flow ODE, solved in the coordinates of Karras et al. 2022.

For x/alpha = x_0 + s * eps, where s = sigma/alpha, the ODE of Song et al. 2021 (SDE, eq. 13) is d(x/alpha)/ds = eps.
"""

from __future__ import annotations

from torch import Tensor

from trainer.diffusion.predictor import Predictor
from trainer.diffusion.respacing import LARGEST_SIGMA
from trainer.diffusion.samplers.sampler import Noise, Solver
from trainer.diffusion.schedules import Schedule


def euler(predictor: Predictor, noise: Noise) -> Solver:
    """Euler's method, order 1: x_0 + s' eps. That is DDIM with eta = 0 (Song et al. 2021, DDIM, section 4.3)."""
    level = predictor.diffusion.schedule.level

    def solve(x: Tensor, start: int, end: int) -> Tensor:
        prediction, there = predictor(x, start), level(end)
        return there.alpha * prediction.x0 + there.sigma * prediction.eps

    return solve


def heun(predictor: Predictor, noise: Noise) -> Solver:
    """Heun's method, order 2: the mean slope of both ends (Karras et al. 2022, algorithm 1).

    Two network calls a step. The step to the image, where there is no slope to ask for, is Euler's; and so is one from
    above s = 80, where Karras et al. start: it may be a factor of 1000 long (the cosine schedule's first), over which
    no mean of two slopes is a good one, while x_0 there is nearly the same all along.
    """
    schedule = predictor.diffusion.schedule

    def solve(x: Tensor, start: int, end: int) -> Tensor:
        there = schedule.level(end)
        s, s_next = schedule.level(start).scaled_sigma, there.scaled_sigma
        first = predictor(x, start)
        scaled = first.x0 + s_next * first.eps
        if heun_calls(schedule, start, end) == 2:
            second = predictor(there.alpha * scaled, end)
            scaled = scaled + (s_next - s) / 2 * (second.eps - first.eps)
        return there.alpha * scaled

    return solve


def heun_calls(schedule: Schedule, start: int, end: int) -> int:
    """Network calls of a step of `heun`: two, or one where it is Euler's."""
    return 2 if end >= 0 and schedule.level(start).scaled_sigma <= LARGEST_SIGMA else 1
