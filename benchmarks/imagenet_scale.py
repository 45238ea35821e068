"""The data pipeline at ImageNet's size, without the images: `python -m benchmarks.imagenet_scale`.

A split of 1,281,167 samples with a true manifest and index; its shards are files of the right size that hold nothing.
For each number of shards, in processes that are fresh:

    manifest, index    their bytes
    start              ShardDataset and TrainStream to the first batch's sample numbers, wall and CPU seconds
    memory             growth of a process by it, resident and proportional, where 8 processes of a machine have it
    order              CPU seconds of making one epoch's order
    seek               to step 1,000,000 from a fresh stream, and to a neighbour of it
    requests           an epoch of batches of 128: sample numbers, and where their bytes lie; CPU µs an image

Goals: a start below 5 s with 1,300 shards and below 30 s with 100,000.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.splits import describe, memory_mib, shard_entry
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.index import FILE_NAME as INDEX_FILE
from data_pipeline.index import Index
from data_pipeline.manifest import FILE_NAME as MANIFEST_FILE
from data_pipeline.stream import TrainStream

NUM_SAMPLES, NUM_CLASSES, IMAGE_SIZE = 1_281_167, 1_000, 64
GOALS = {1_300: 5.0, 100_000: 30.0}  # seconds of a start, by number of shards
BATCH = 128
STEP = 1_000_000
NUM_PROCESSES = 8
BLOCK = 512  # tar's unit
ROOT = Path(__file__).resolve().parents[1]


def write_hollow_split(folder: Path, num_shards: int, num_samples: int = NUM_SAMPLES) -> None:
    """Manifest, index, and shards that take no room on the disk."""
    rng = np.random.default_rng(0)
    bounds = np.arange(num_shards + 1) * num_samples // num_shards
    shard = np.repeat(np.arange(num_shards, dtype=np.int32), np.diff(bounds))
    size = rng.integers(6_000, 11_000, num_samples)
    room = BLOCK + -(-size // BLOCK) * BLOCK + 2 * BLOCK  # header and image, header and label
    ends = np.cumsum(room)
    begins = np.append(0, ends)[bounds]  # of each shard, and the end: [num_shards + 1]
    index = Index(
        key=np.array([b"%09d" % number for number in range(num_samples)]),
        shard=shard,
        offset=ends - room - begins[shard] + BLOCK,
        size=size,
        crc32=rng.integers(0, 1 << 32, num_samples, dtype=np.uint32),
        label=np.arange(num_samples) * NUM_CLASSES // num_samples,
    )
    folder.mkdir(parents=True)
    shards = []
    for number, (count, num_bytes) in enumerate(zip(np.diff(bounds).tolist(), np.diff(begins).tolist(), strict=True)):
        path = folder / f"shard-{number:06d}.tar"
        with open(path, "wb") as file:
            os.truncate(file.fileno(), num_bytes + 2 * BLOCK)
        shards.append(shard_entry(path, count, hashlib.sha256(path.name.encode()).hexdigest()))
    describe(folder, index, shards, "png", image_size=IMAGE_SIZE)


def start(folder: Path) -> tuple[ShardDataset, TrainStream, dict[str, Any]]:
    """What a training process does before its first batch, and what it takes."""
    before, wall, cpu = memory_mib(), time.perf_counter(), time.process_time()
    dataset = ShardDataset(folder)
    stream = TrainStream(dataset, seed=0, random_flip=True)
    stream.order.samples(0, BATCH)
    seconds = {"start_seconds": time.perf_counter() - wall, "start_cpu_seconds": time.process_time() - cpu}
    return dataset, stream, seconds | {"before_mib": before}


def requests(dataset: ShardDataset, stream: TrainStream) -> int:
    """An epoch of batches without the images; returns the bytes asked for."""
    index, num_bytes = dataset.index, 0
    columns = (index.shard, index.offset, index.size, index.crc32, index.label)
    for position in range(0, len(dataset), BATCH):
        samples = stream.order.samples(position, min(BATCH, len(dataset) - position))
        _, _, sizes, _, _ = (column[samples].tolist() for column in columns)
        num_bytes += sum(sizes)
    return num_bytes


def measure(folder: Path) -> dict[str, Any]:
    """All figures of one process but its memory."""
    dataset, stream, found = start(folder)
    began = time.process_time()
    stream.order.epoch(1)
    found["order_seconds"] = time.process_time() - began
    began = time.process_time()
    asked = requests(dataset, stream)
    found["request_us"] = 1e6 * (time.process_time() - began) / len(dataset)
    assert asked == int(dataset.index.size.sum())
    fresh = TrainStream(dataset, seed=0, random_flip=True)
    for name, step in (("seek_seconds", STEP), ("next_seconds", STEP + 1)):
        began = time.perf_counter()
        fresh.order.samples(step * BATCH, BATCH)
        found[name] = time.perf_counter() - began
    return found


def wait_with_memory(folder: Path) -> None:
    """Start, go through an epoch of requests, say so, and hold it until told otherwise."""
    dataset, stream, found = start(folder)
    requests(dataset, stream)
    print(json.dumps(found), flush=True)
    sys.stdin.read()


def _child(kind: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.imagenet_scale", f"--{kind}", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise UserError("a process of the benchmark failed; its error stands above.")
    found: dict[str, Any] = json.loads(line)
    return found


def _end(child: subprocess.Popen[str]) -> None:
    child.communicate()


def memory_of_processes(folder: Path) -> dict[str, float]:
    """Growth of a process in MiB where several have the same split open: the median over them."""
    children = [_child("hold", folder) for _ in range(NUM_PROCESSES)]
    before = [_answer(child)["before_mib"] for child in children]
    after = [memory_mib(child.pid) for child in children]
    for child in children:
        _end(child)
    return {
        f"{kind}_growth_mib": statistics.median(b[kind] - a[kind] for a, b in zip(before, after, strict=True))
        for kind in ("rss", "pss")
    }


def row_of(folder: Path, num_shards: int) -> dict[str, Any]:
    """All figures of one split."""
    child = _child("measure", folder)
    found = _answer(child)
    _end(child)
    found.pop("before_mib")
    return {
        "num_shards": num_shards, "num_samples": NUM_SAMPLES,
        "manifest_bytes": (folder / MANIFEST_FILE).stat().st_size,
        "index_bytes": (folder / INDEX_FILE).stat().st_size,
        **found, **memory_of_processes(folder), "goal_seconds": GOALS.get(num_shards),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shards", default="1300,100000", help="comma-separated numbers of shards")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    for kind in ("measure", "hold"):  # what this script starts itself as
        parser.add_argument(f"--{kind}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return 0
    if options.hold is not None:
        wait_with_memory(options.hold)
        return 0
    rows = []
    for num_shards in map(int, options.shards.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            write_hollow_split(Path(scratch, "train"), num_shards)
            rows.append(row_of(Path(scratch, "train"), num_shards))
        print(describe_row(rows[-1]), flush=True)
    if options.json is not None:
        write_json(options.json, {"machine": machine(), "batch": BATCH, "processes": NUM_PROCESSES, "rows": rows})
    return 0


def describe_row(row: dict[str, Any]) -> str:
    """A paragraph of the table."""
    goal = f" (goal: below {row['goal_seconds']:.0f} s)" if row["goal_seconds"] else ""
    return (
        f"{row['num_samples']:,} samples in {row['num_shards']:,} shards: "
        f"manifest {row['manifest_bytes'] / 1e6:.1f} MB, index {row['index_bytes'] / 1e6:.1f} MB\n"
        f"  start {row['start_seconds']:.2f} s{goal}, {row['start_cpu_seconds']:.2f} s of CPU time\n"
        f"  each of {NUM_PROCESSES} processes grows by {row['rss_growth_mib']:.0f} MiB resident, "
        f"{row['pss_growth_mib']:.0f} MiB with shared pages divided\n"
        f"  order of an epoch {row['order_seconds']:.2f} s; seek to step {STEP:,} {row['seek_seconds']:.2f} s, "
        f"to the next {1e6 * row['next_seconds']:.0f} µs\n"
        f"  requests {row['request_us']:.2f} µs an image"
    )


def machine() -> str:
    """Of the results, in words."""
    import torch  # not above: it would lie in the memory that is measured

    from benchmarks.unet_step import machine

    return machine(torch.device("cpu"))


if __name__ == "__main__":
    run_cli(main)
