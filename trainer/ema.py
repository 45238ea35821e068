"""Exponential moving averages of the weights, kept on the fragments of the master copy that a process owns."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.engine import Fragment


class ShardedEma:
    """ema <- decay * ema + (1 - decay) * weights after every step, for each of several decays.

    Elementwise, so each process averages its own fragments: no gathering, and bit for bit what an average of the
    whole weights would be. Young averages follow faster: decay is min(decay, (1 + step) / (10 + step)). A step that
    was skipped counts as one that left the weights as they were.
    """

    def __init__(self, fragments: list[Fragment], decays: dict[str, float]) -> None:
        """`decays` by name, as in `TrainConfig.ema_decays`."""
        self.decays = decays
        self._weights = [f.weight for f in fragments]
        # By the average's name: tensors beside `fragments`, each [n] float32.
        self.shadows: dict[str, list[Tensor]] = {name: [w.clone() for w in self._weights] for name in decays}

    def update(self, step: int) -> None:
        """`step`: steps made before this one, from 0."""
        if not self._weights:
            return  # a process that owns nothing: more processes than elements
        for name, decay in self.decays.items():
            now = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.shadows[name], self._weights, 1.0 - now)
