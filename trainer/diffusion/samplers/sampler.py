"""What all samplers have in common: the way from noise to an image, level by level.

A sampler is a `Solver`, which takes x from one level of noise to a lower one, and what there is to know of it. Levels
are the steps of a (respaced) process, and -1 the image itself, without noise; only at steps is the network asked.
Arithmetic is elementwise in the images, or of each image by itself: so a sample depends on its own x_T and noise
alone, up to the rounding of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trainer.diffusion.predictor import Predictor
from trainer.diffusion.schedules import Schedule

Noise = Callable[[], Tensor]  # the next standard normal noise, [B, C, H, W]
# (x at a step, that step, the level to go to) -> x there. One is made for one batch: it may remember earlier steps.
Solver = Callable[[Tensor, int, int], Tensor]
Corrector = Callable[[Predictor, Tensor, int, Noise], Tensor]  # (predictor, x, its step, noise) -> x at the same step
# (schedule, a step, the level to go to) -> network calls of the solver on this way.
SolverCalls = Callable[[Schedule, int, int], int]


def one_a_step(schedule: Schedule, start: int, end: int) -> int:
    """One network call at every step that is left behind."""
    return start - end


@dataclass(frozen=True)
class Sampler:
    """A way to sample, as a function of (predictor, x_T, noise, options)."""

    make_solver: Callable[..., Solver]  # of (predictor, noise), and of `options` by name
    options: tuple[str, ...] = ()  # keys of SamplingConfig that this sampler alone hears
    stride: int = 1  # levels that the solver is taken down at once; those between are its intermediate points
    solver_calls: SolverCalls = one_a_step

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
        solver = self.make_solver(predictor, noise, **options)
        for start, end in self._ways(predictor.diffusion.schedule, stop):
            x = solver(x, start, end)
            if corrector is not None and end >= 0:
                x = corrector(predictor, x, end, noise)
        return x

    def num_calls(self, schedule: Schedule, *, stop: int = 0, corrector_steps: int = 0) -> int:
        """Network calls of a sample on a process, of the solver and of a corrector that makes so many an arrival."""
        return sum(
            self.solver_calls(schedule, start, end) + corrector_steps * (end >= 0)
            for start, end in self._ways(schedule, stop)
        )

    def _ways(self, schedule: Schedule, stop: int) -> Iterator[tuple[int, int]]:
        """From level to level: from the first step to the last, and to the image where that is the end."""
        last = schedule.last_step(stop)
        lowest = max(last, 0)
        steps = [*range(schedule.num_timesteps - 1, lowest, -self.stride), lowest]
        return pairwise(steps if last >= 0 else [*steps, -1])
