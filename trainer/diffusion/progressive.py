"""What a model already knows of an image on its way to it (Ho et al. 2020, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trainer.diffusion.gaussian import Prediction
from trainer.diffusion.predictor import Predictor


@dataclass(frozen=True)
class Recorder(Predictor):
    """A predictor that remembers what it was asked and what it said at some steps.

    A sampler that asks more than once at a step (a corrector) leaves the last.
    """

    steps: frozenset[int] = frozenset()  # of its process
    x: dict[int, Tensor] = field(default_factory=dict)  # by step: x_t, [B, C, H, W]
    x0: dict[int, Tensor] = field(default_factory=dict)  # by step: the x_0 predicted from it, [B, C, H, W]

    def __call__(self, x: Tensor, step: int) -> Prediction:
        return self._noted(super().__call__(x, step), x, step)

    def with_shifted_mean(self, x: Tensor, step: int) -> Prediction:
        return self._noted(super().with_shifted_mean(x, step), x, step)

    def _noted(self, prediction: Prediction, x: Tensor, step: int) -> Prediction:
        if step in self.steps:
            self.x[step], self.x0[step] = x, prediction.x0
        return prediction


def evenly(num_steps: int, count: int) -> tuple[int, ...]:
    """So many of the steps 0 .. num_steps - 1, evenly spaced, descending, both ends among them."""
    if count == 1:
        return (num_steps - 1,)
    return tuple(round((num_steps - 1) * (1 - i / (count - 1))) for i in range(count))
