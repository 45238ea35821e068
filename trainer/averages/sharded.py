"""Moving averages of the weights, kept on the fragments of the master copy that a process owns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.averages.rules import DecayRule
from trainer.engine import Fragment


class ShardedEma:
    """ema <- decay * ema + (1 - decay) * weights after every step, for each of several averages.

    Elementwise, so each process averages its own fragments: no gathering, and bit for bit what an average of the
    whole weights would be. A step that was skipped counts as one that left the weights as they were.
    """

    def __init__(self, fragments: list[Fragment], rules: Mapping[str, DecayRule]) -> None:
        """`rules` by the averages' names, as in `TrainConfig.averages`."""
        self.rules = rules
        self._weights = [f.weight for f in fragments]
        # By the average's name: tensors beside `fragments`, each [n] float32.
        self.shadows: dict[str, list[Tensor]] = {name: [w.clone() for w in self._weights] for name in rules}

    def update(self, step: int) -> None:
        """`step`: steps made before this one, from 0."""
        if not self._weights:
            return  # a process that owns nothing: more processes than elements
        for name, rule in self.rules.items():
            torch._foreach_lerp_(self.shadows[name], self._weights, 1.0 - rule.decay(step))
