"""Has a trial that runs diverged? Judged by the error of its predictions, long before the loss is no number any more.

The mean squared error is what every objective brings down, without the rare large terms that a bound has. A run has
diverged when all of its last few records are far above the level it had reached (the lowest median of as many records):
spikes, even frequent ones, are none. A loss that is not finite is the trainer's own business: it skips the step, and
gives up after many.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from cluster.definition.spec import EarlyStop
from trainer.tracking.records import Place, read_new_train_records

ERROR = "train/mse"


@dataclass
class ErrorWatch:
    """The errors of one run, read as they are written."""

    rule: EarlyStop
    after: int = -1  # images: what came before does not count
    _place: Place = field(default_factory=Place)
    _nimg: int = -1
    _recent: deque[float] = field(default_factory=deque)
    _level: float = float("inf")

    def look(self, run: Path) -> str | None:
        """Read what is new. Returns why the run should end, or None."""
        records, self._place = read_new_train_records(run, self._place)
        for record in records:
            if record.nimg > max(self._nimg, self.after) and ERROR in record.values:
                self._nimg = record.nimg
                found = self._add(record.values[ERROR])
                if found is not None:
                    return f"diverged at {record.nimg:,} images: {found}"
        return None

    def _add(self, error: float) -> str | None:
        self._recent.append(error)
        if len(self._recent) > self.rule.window:
            self._recent.popleft()
        if len(self._recent) < self.rule.window:
            return None
        lowest = min(self._recent)
        if lowest > self.rule.loss_factor * self._level:
            return (
                f"the mean squared error of its last {self.rule.window} records, {lowest:.4g} and more, is above "
                f"early_stop.loss_factor={self.rule.loss_factor:g} times the {self._level:.4g} that it had reached"
            )
        self._level = min(self._level, statistics.median(self._recent))
        return None
