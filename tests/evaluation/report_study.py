"""A small generated study: laws, and run folders with training records and sample grids."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scaling_points import SIZES, study

from evaluation.report.run_files import RunFiles
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.law import Law, fit_law
from trainer.tracking.records import RecordWriter, TrainRecord

QUICK = Settings(num_rounds=40)


@lru_cache(maxsize=1)
def law() -> Law:
    return fit_law(study(num_seeds=2), settings=QUICK)


def write_runs(folder: Path, *, num_intervals: int = 20) -> list[RunFiles]:
    """A run folder for each run of `study(num_seeds=2)`."""
    runs = []
    for size, flops in SIZES:
        for seed in range(2):
            run = RunFiles(f"size{size}-seed{seed}", folder / f"size{size}-seed{seed}", size, seed)
            _write_records(run, flops, num_intervals)
            _write_grids(run)
            runs.append(run)
    return runs


def _write_records(run: RunFiles, flops: float, num_intervals: int) -> None:
    writer = RecordWriter(run.folder, 0)
    for i in range(1, num_intervals + 1):
        values = {f"train/mse_q{q}": (q + 1) / i for q in range(4)}
        values |= {"speed/img_per_second": 1e9 / flops, "speed/mfu": 0.2, "train/loss": math.nan if i == 3 else 1 / i}
        writer.write(TrainRecord(256 * i, 256 * i * flops, 1000.0 + i, values))
    writer.close()


def _write_grids(run: RunFiles) -> None:
    (run.folder / "samples").mkdir()
    noise = np.random.default_rng(run.seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for nimg in (256, 1024, 4096):
        Image.fromarray(noise).save(run.folder / "samples" / f"{nimg:012d}.png")
