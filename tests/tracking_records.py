"""Records of small made-up runs, and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.tracking.records import EvalRecord, RecordWriter, TrainRecord

FLOPS = 2.0e8  # training FLOPs of one image


def write_records(folder: Path, start: int, steps: range, *, time: float, loss: float = 1.0) -> None:
    writer = RecordWriter(folder, start)
    for nimg in steps:
        writer.write(TrainRecord(nimg, nimg * FLOPS, time + nimg, {"train/loss": loss / nimg}))
    writer.close()


def eval_record(nimg: int, split: str = "test", *, time: float = 500.0, value: float = 5.0) -> EvalRecord:
    return EvalRecord(
        metric="nll", split=split, value=value + 100 / nimg, stderr=0.03, n=2048, seeds=[0], measured={}, data="d",
        weights="w", run="r", nimg=nimg, compute=nimg * FLOPS, num_params=10, flops_per_image=FLOPS, seed=0,
        time=time + nimg,
    )  # fmt: skip


def write_eval(folder: Path, *records: EvalRecord, key: str = "k") -> None:
    path = folder / "evals" / f"{records[0].nimg:012d}" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"records": [r.to_json() for r in records], "spec": {}}))
