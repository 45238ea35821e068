"""Exponential moving average of the weights, kept on the fragments of the master copy that a process owns."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.engine import Fragment


class ShardedEma:
    """ema <- decay * ema + (1 - decay) * weights after every step.

    Elementwise, so each process averages its own fragments: no gathering, and bit for bit what an average of the
    whole weights would be. Young averages follow faster: decay is min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, fragments: list[Fragment], decay: float) -> None:
        self.decay = decay
        self._weights = [f.weight for f in fragments]
        self.shadows: list[Tensor] = [w.clone() for w in self._weights]  # beside `fragments`, each [n] float32

    def update(self, step: int) -> None:
        """`step`: updates made before this one, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadows, self._weights, 1.0 - decay)
