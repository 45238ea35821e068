"""Has a trial that runs diverged? Judged by its training loss, long before it is so bad that it is no number.

The median over a few records is compared with the lowest such median before: a spike is no divergence, nor is the noise
of a single record. A loss that is not finite is the trainer's own business: it skips the step, and gives up after many.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from cluster.spec import EarlyStop
from trainer.tracking.records import Place, read_new_train_records

LOSS = "train/loss"


@dataclass
class LossWatch:
    """The losses of one run, read as they are written."""

    rule: EarlyStop
    _place: Place = field(default_factory=Place)
    _nimg: int = -1
    _recent: deque[float] = field(default_factory=deque)
    _lowest: float = float("inf")

    def look(self, run: Path) -> str | None:
        """Read what is new. Returns why the run should end, or None."""
        records, self._place = read_new_train_records(run, self._place)
        for record in records:
            if record.nimg > self._nimg and LOSS in record.values:
                self._nimg = record.nimg
                found = self._add(record.values[LOSS])
                if found is not None:
                    return f"diverged at {record.nimg:,} images: {found}"
        return None

    def _add(self, loss: float) -> str | None:
        self._recent.append(loss)
        if len(self._recent) > self.rule.window:
            self._recent.popleft()
        if len(self._recent) < self.rule.window:
            return None
        median = statistics.median(self._recent)
        if median > self.rule.loss_factor * self._lowest:
            return (
                f"its training loss over {self.rule.window} records, {median:.4g}, is more than "
                f"early_stop.loss_factor={self.rule.loss_factor:g} times the {self._lowest:.4g} that it had reached"
            )
        self._lowest = min(self._lowest, median)
        return None
