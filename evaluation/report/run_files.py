"""What the report reads of each run: its training records and its grids of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.tracking.records import TrainRecord, read_train_records

NUM_BINS = 60  # of a training curve, equal in log images


@dataclass(frozen=True)
class RunFiles:
    """A run's folder and what names it."""

    name: str
    folder: Path
    num_params: int
    seed: int = 0


@dataclass(frozen=True)
class RunRecords:
    """A run with its training records, by images seen."""

    run: RunFiles
    records: tuple[TrainRecord, ...]

    @property
    def flops_per_image(self) -> float:
        return self.records[-1].compute / self.records[-1].nimg if self.records else math.nan

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(images seen, value), the finite positive values averaged within bins that are equal in log images."""
        kept = [(r.nimg, v) for r in self.records if r.nimg > 0 and (v := r.values.get(name, math.nan)) > 0]
        kept = [(x, v) for x, v in kept if math.isfinite(v)]
        if len(kept) <= NUM_BINS:
            return [(float(x), v) for x, v in kept]
        x, y = (np.array(column, dtype=np.float64) for column in zip(*kept, strict=True))
        edges = np.geomspace(x[0], x[-1], NUM_BINS + 1)
        bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, NUM_BINS - 1)
        count = np.bincount(bins, minlength=NUM_BINS)
        used = count > 0
        means = [np.bincount(bins, weights=column, minlength=NUM_BINS)[used] / count[used] for column in (x, y)]
        return list(zip(means[0].tolist(), means[1].tolist(), strict=True))

    def median(self, name: str) -> float | None:
        """The median over the run's intervals, without the first, which holds the warm-up."""
        values = [v for r in self.records[1:] or self.records if math.isfinite(v := r.values.get(name, math.nan))]
        return float(np.median(values)) if values else None


def read_runs(runs: Sequence[RunFiles]) -> list[RunRecords]:
    """The runs' records; a run that has not begun has none."""
    return [RunRecords(run, tuple(read_train_records(run.folder))) for run in runs]
