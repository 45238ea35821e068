"""How long the importer takes for a great study: the first import, a pass without news, and one with one new record.

    python -m benchmarks.mlflow_import [--trials 100] [--records 1000] [--values 15] [--folder DIR]

CPU seconds are those of this process; the store is a sqlite file in the same folder. `again` is a new process's pass
over folders that were sent before; `followed` is the pass of the process that goes on following them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.tracking.mlflow_store import connect
from trainer.tracking.mlflow_sync import sync_folder
from trainer.tracking.records import EvalRecord, RecordWriter, TrainRecord

_FLOPS = 1e9  # of one image
_EVALUATIONS = 10


def write_trial(folder: Path, number: int, num_records: int, num_values: int) -> None:
    """A run's folder as the trainer and the evaluation leave it."""
    folder.mkdir(parents=True)
    tags = {"study": "great", "size": f"C={number}"}
    (folder / "run.json").write_text(json.dumps({"id": f"r{number}", "name": f"C={number}", "seed": 0, "tags": tags}))
    (folder / "config.yaml").write_text("model: {channels: 8, image_size: 32}\n")
    writer = RecordWriter(folder, 0)
    for step in range(1, num_records + 1):
        values = {f"train/value{i}": i + 1 / step for i in range(num_values)}
        writer.write(TrainRecord(step * 100, step * 100 * _FLOPS, 1e9 + step, values))
    writer.close()
    for i in range(1, _EVALUATIONS + 1):
        nimg = i * num_records * 100 // _EVALUATIONS
        record = EvalRecord(
            "nll", "test", 3 + 100 / nimg, 0.01, 2048, [0], {"T": 4000}, "data", "weights", f"r{number}", nimg,
            nimg * _FLOPS, 1000 * number, _FLOPS, 0,
        )  # fmt: skip
        path = folder / "evals" / f"{nimg:012d}" / "k.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"records": [record.to_json()]}))


def measure(name: str, work: Callable[[], Any]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{name:40}{time.perf_counter() - wall:10.2f} s{time.process_time() - cpu:10.2f} s CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlflow_import", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--records", type=int, default=1000, help="training records of a trial")
    parser.add_argument("--values", type=int, default=15, help="values of a record")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(args.folder or Path(temporary), args)


def run(folder: Path, args: argparse.Namespace) -> None:
    study = folder / "great"
    for number in range(args.trials):
        write_trial(study / "trials" / f"c{number:03d}", number, args.records, args.values)
    num_points = args.trials * (args.records * (args.values + 1) + _EVALUATIONS * 4)
    print(f"{args.trials} trials, {args.records:,} records of {args.values} values: {num_points:,} points")
    tracker = connect(f"sqlite:///{folder}/mlflow.db", "great")
    seen: dict[Path, Any] = {}
    measure("first import", lambda: sync_folder(study, tracker, seen))
    measure("no news, followed", lambda: sync_folder(study, tracker, seen))
    measure("no news, again", lambda: sync_folder(study, connect(tracker.uri, "great"), {}))
    last = study / "trials" / f"c{args.trials - 1:03d}"
    more = TrainRecord(args.records * 100 + 100, 1.0, 2e9, {f"train/value{i}": 1.0 for i in range(args.values)})
    with open(last / "metrics.0.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(more.__dict__) + "\n")
    measure("one new record, followed", lambda: sync_folder(study, tracker, seen))
    for path in study.glob("trials/*/.mlflow-*.json"):
        path.unlink()
    measure("cursors lost: the tracker is asked", lambda: sync_folder(study, tracker, {}))


if __name__ == "__main__":
    main()
