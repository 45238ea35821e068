"""The simple gradient noise scale: how large a batch is still worth its images.

B_simple = tr(S) / |G|^2, where G is the true gradient and S the covariance of one image's (McCandlish et al. 2018,
"An Empirical Model of Large-Batch Training", section 2.2). The expected squared norm of the mean gradient of B images
is |G|^2 + tr(S) / B, so two batch sizes give both (appendix A.1): the small one is a micro-batch of one process, the
big one the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A single pair of norms is far too noisy (the estimate of |G|^2 may even be negative): both estimates are averaged
# over intervals before the division, with weights that fall by this factor an interval.
SMOOTHING = 0.95


class NoiseScale:
    """Measures the gradients of micro-batches, in steps that are chosen for it.

    It listens at the parameters only during such a step, where each sees the micro-batch's own gradient before
    anything accumulates or reduces it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, micro_batch: int, global_batch: int, accumulation: int):
        """`accumulation`: micro-batches of a process in a step; the loss of each is divided by it backward."""
        self.possible = global_batch > micro_batch  # else there are no two batch sizes
        self._parameters = [p for p in parameters if p.requires_grad]
        self._accumulation = accumulation
        self._squares: Tensor | None = None
        self._loss_scale: Tensor | None = None

    @contextmanager
    def watch(self, measure: bool = True, loss_scale: Tensor | None = None) -> Iterator[None]:
        """Around all micro-batches of one step; does nothing unless `measure` and the measurement is possible.

        `loss_scale` is what fp16 multiplies the losses of this step by.
        """
        self._squares = None
        self._loss_scale = None if loss_scale is None else loss_scale.clone()  # the step's end may change it
        handles = [p.register_hook(self._add) for p in self._parameters] if measure and self.possible else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        self._squares = square if self._squares is None else self._squares + square

    def small_square(self) -> Tensor | None:
        """Mean over this process's micro-batches of their squared gradient norm: a float64 scalar on the device.

        None if the step was not measured.
        """
        if self._squares is None:
            return None
        # Each gradient is scale / accumulation of the micro-batch's own, and there are `accumulation` of them.
        mean = self._squares * self._accumulation
        return mean if self._loss_scale is None else mean / self._loss_scale.double().square()


def estimates(small_square: float, big_square: float, *, small: int, big: int) -> tuple[float, float]:
    """Unbiased (tr(S), |G|^2) from squared gradient norms at two batch sizes, small < big (appendix A.1)."""
    trace = (small_square - big_square) / (1 / small - 1 / big)
    return trace, (big * big_square - small * small_square) / (big - small)


class SmoothedNoiseScale:
    """B_simple in images, from the measurements of many intervals; a resumed run begins anew."""

    def __init__(self, *, small: int, big: int) -> None:
        self._small, self._big = small, big
        self._trace = self._square = 0.0  # weighted sums: the weights cancel in the ratio

    def add(self, small_square: float, big_square: float) -> float | None:
        """Take in an interval's measurement; returns B_simple, None while an estimate is not positive."""
        trace, square = estimates(small_square, big_square, small=self._small, big=self._big)
        self._trace = SMOOTHING * self._trace + trace
        self._square = SMOOTHING * self._square + square
        return self._trace / self._square if self._trace > 0 and self._square > 0 else None
