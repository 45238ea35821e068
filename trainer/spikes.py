"""Notices when the loss jumps.

Losses are compared as logarithms, so that a run of any scale is judged alike, with the median of the intervals before
and their spread (1.4826 x the median absolute deviation is a normal distribution's standard deviation). Median and MAD
do not mind the spikes themselves, and while the loss still falls steeply, both the median and the spread lie high.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 50  # intervals that make up the usual level; half of them make a new level the usual one
MIN_SEEN = 20  # before that the spread is not known well enough
DEVIATIONS = 8.0
MIN_RATIO = 1.2  # over the usual level: where the loss hardly moves, eight deviations are nothing to speak of


class SpikeWatch:
    """Judges the mean loss of one interval after the other; a resumed run is shown its earlier records first."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # (log loss, images)
        self._in_spike = False

    def look(self, nimg: int, loss: float, images: int) -> tuple[bool, str | None]:
        """(whether the interval of `images` ending at nimg is a spike, a line to print where one begins)."""
        level = math.log(max(loss, 1e-30))
        usual, spike = 0.0, False
        if len(self._seen) >= MIN_SEEN:
            levels = [value for value, _ in self._seen]
            usual = statistics.median(levels)
            spread = 1.4826 * statistics.median(abs(value - usual) for value in levels)
            # An interval cut short by a checkpoint is a mean of fewer images: it may stray further.
            spread *= math.sqrt(max(1.0, statistics.median(count for _, count in self._seen) / max(images, 1)))
            spike = level > usual + max(DEVIATIONS * spread, math.log(MIN_RATIO))
        self._seen.append((level, images))
        begins, self._in_spike = spike and not self._in_spike, spike
        if not begins:
            return spike, None
        return True, f"loss spike: {loss:.5g} at {nimg:,} images, where {math.exp(usual):.5g} was usual"
