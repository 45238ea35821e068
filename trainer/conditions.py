"""What a network is told beside x_t and its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Conditions(NamedTuple):
    """A network is called as `network(x, time, *conditions)`: with tensors alone, which every engine can see.

    A new kind of condition is a field more at the end, None for networks that do not hear it.
    """

    labels: Tensor | None = None  # [B] int64, classes; -1: none
    low_res: Tensor | None = None  # [B, C, h, w] in [-1, 1], what a super-resolution network enlarges
    low_res_time: Tensor | None = None  # [B] float32: how noisy that is, in units of the network's time

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Those that are there, each changed: to a device, to some of the rows."""
        return Conditions(*(None if value is None else change(value) for value in self))
