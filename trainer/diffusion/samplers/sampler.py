"""What all samplers have in common: the way from noise to an image, level by level.

A sampler is a `Solver`, which takes x from one level of noise to a lower one, and what there is to know of it. Levels
are the steps of a (respaced) process, and -1 the image itself, without noise; only at steps is the network asked.
Arithmetic is elementwise in the images, or of each image by itself: so a sample depends on its own x_T and noise
alone, up to the rounding of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trainer.diffusion.predictor import Predictor

Noise = Callable[[], Tensor]  # the next standard normal noise, [B, C, H, W]
# (x at a step, that step, the level to go to) -> x there. One is made for one batch: it may remember earlier steps.
Solver = Callable[[Tensor, int, int], Tensor]
Corrector = Callable[[Predictor, Tensor, int, Noise], Tensor]  # (predictor, x, its step, noise) -> x at the same step


@dataclass(frozen=True)
class Sampler:
    """A way to sample, as a function of (predictor, x_T, noise, options)."""

    make_solver: Callable[..., Solver]  # of (predictor, noise), and of `options` by name
    options: tuple[str, ...] = ()  # keys of SamplingConfig that this sampler alone hears
    stride: int = 1  # levels that the solver is taken down at once; those between are its intermediate points
    calls_on_arrival: int = 0  # network calls at the step that it reaches, besides one at every step that it leaves

    @torch.no_grad()
    def __call__(
        self,
        predictor: Predictor,
        x: Tensor,
        *,
        noise: Noise,
        stop: int = 0,
        corrector: Corrector | None = None,
        **options: float,
    ) -> Tensor:
        """From x_T to x_0.

        Args:
            x: x_T, [B, C, H, W].
            noise: whatever is drawn on the way.
            stop: a step of the original process: end at the last visited one that is not below, with its noise; 0: at
                the image. That step is `predictor.diffusion.schedule.last_step(stop)`.
            corrector: asked wherever the solver arrives, except at the image.
            options: those that `self.options` names.

        Returns x_0, or x at the step of `stop`: [B, C, H, W]. Raises ConfigError for a `stop` above all steps.
        """
        solver, schedule = self.make_solver(predictor, noise, **options), predictor.diffusion.schedule
        for start, end in pairwise(self._levels(schedule.num_timesteps, schedule.last_step(stop))):
            x = solver(x, start, end)
            if corrector is not None and end >= 0:
                x = corrector(predictor, x, end, noise)
        return x

    def num_calls(self, num_steps: int, *, corrector_steps: int = 0, last_step: int = -1) -> int:
        """Network calls of a sample on a process of so many steps; `last_step` as `Schedule.last_step` gives it."""
        arrivals = sum(level >= 0 for level in self._levels(num_steps, last_step)[1:])
        return num_steps - 1 - last_step + arrivals * (self.calls_on_arrival + corrector_steps)

    def _levels(self, num_steps: int, last_step: int) -> list[int]:
        """Where x is taken, from the first step to the last, and to the image where that is the end."""
        lowest = max(last_step, 0)
        return [*range(num_steps - 1, lowest, -self.stride), lowest, *([-1] if last_step < 0 else [])]
