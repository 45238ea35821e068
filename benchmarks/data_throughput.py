"""The data pipeline against WebDataset, MosaicML Streaming and its limits: `python -m benchmarks.data_throughput`.

Every contestant makes shuffled batches of 128 from the very same stored images, which lie in the page cache, with one
thread in one process. They take turns, an epoch each a round; figures are CPU time (of all threads of the process)
an image, medians over the rounds, and ratios are those of neighbours in a round. The contestants:

    ours           TrainStream.batch: order, reading, checksums, decoding, batches [B, C, H, W], labels
    ours, flips    the same with random flips
    step inputs    InputSource.make, what a training step consumes: flips, the numbers that decide timesteps, and noise
    bare decode    the same decoder on payloads that lie in memory, in batches: the limit of encoded images
    bare Pillow    Pillow on payloads that lie in memory, one by one, into nothing: what others pay at the least
    bare read      os.preadv of the same bytes in the same order into batches that lie ready: the limit of raw images
    webdataset     WebDataset(...).shuffle(1000).decode("rgb8").to_tuple(...).batched(128) on the same tar files
    streaming      StreamingDataset(shuffle=True) on the same bytes as MDS shards, stacked to batches
    streaming, indexed    the same samples by dataset[i], without its iterator and the threads that run beside it

The peers check no checksums and hand out batches [B, H, W, C]; nothing is added to them. Streaming needs an interpreter
with an environment of its own (streaming_peer.py says how to make it): --streaming-python PATH.

Then: the same with two threads; and memory over ten epochs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.splits import Images, memory_mib, photographs, write_split
from benchmarks.streaming_peer import StreamingPeer
from data_pipeline import codec, png
from data_pipeline.codec import Encoding
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.stream import ImageBatch, TrainStream

BATCH = 128
KEPT = 4  # batches that a consumer has at a time: those made ahead and the one in use
CHUNK = 32  # images that are decoded together, as by ShardDataset
NUM_SHARDS = 8
SEED = 0
MEMORY_EPOCHS = 10
MEMORY_CASE = "64 png"
PEERS = ("bare Pillow", "webdataset", "streaming", "streaming, indexed")
DEFAULT_DATA = Path("data/cifar10/train")
ROOT = Path(__file__).resolve().parents[1]

Epoch = Callable[[], float]  # runs one epoch; CPU seconds an image


def _pillow(image_format: str, **options: Any) -> Callable[[Images], bytes]:
    def encode(image: Images) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode


@dataclass(frozen=True)
class Case:
    """One kind of shards."""

    size: int  # pixels
    num: int  # images, whole batches
    encoding: Encoding
    extension: str
    encode: Callable[[Images], bytes]


CASES = {
    "32 png": Case(32, 8192, "png", "png", codec.encode),
    "32 npy": Case(32, 8192, "npy", "npy", lambda image: codec.encode(image, "npy")),
    "64 png": Case(64, 4096, "png", "png", codec.encode),
    "64 npy": Case(64, 4096, "npy", "npy", lambda image: codec.encode(image, "npy")),
    "64 png of Pillow": Case(64, 4096, "any", "png", _pillow("PNG")),
    "256 png": Case(256, 256, "png", "png", codec.encode),
    "256 npy": Case(256, 512, "npy", "npy", lambda image: codec.encode(image, "npy")),
    "256 jpeg": Case(256, 384, "any", "jpg", _pillow("JPEG", quality=90)),
}


def timed(work: Callable[[], object], num: int) -> float:
    """CPU seconds of this process, over `num`."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / num


def our_epochs(dataset: ShardDataset, *, random_flip: bool, num_threads: int = 1) -> Callable[[], None]:
    """Call after call, one epoch after another."""
    stream = TrainStream(dataset, seed=SEED, random_flip=random_flip, num_threads=num_threads)
    position = 0
    kept: deque[ImageBatch] = deque(maxlen=KEPT)

    def epoch() -> None:
        nonlocal position
        stop = position + len(dataset)
        while position < stop:
            kept.append(stream.batch(position, BATCH))
            position += BATCH

    return epoch


def step_input_epochs(dataset: ShardDataset, case: Case) -> Callable[[], None]:
    """All that a step of the 64 px network consumes, made by one process."""
    import torch

    from trainer.config.run import load_config
    from trainer.inputs import InputSource
    from trainer.processes import Processes

    overrides = [f"data.train={dataset.place}", f"model.image_size={case.size}", "data.num_threads=1"]
    config = load_config(ROOT / "configs/runs/imagenet64/hybrid.yaml", overrides)
    source = InputSource(config, dataset, Processes(0, 1, 0, torch.device("cpu")))

    def epoch() -> None:
        for nimg in range(0, case.num, config.train.global_batch):
            source.make(nimg)

    return epoch


def bare_decode(case: Case, payloads: list[bytes]) -> None:
    """Our decoders alone, into one batch that lies ready."""
    if case.encoding == "any":
        for payload in payloads:
            codec.decode(payload, "any")
        return
    rows = png.empty_rows(CHUNK, case.size, case.size)
    images = np.empty((CHUNK, 3, case.size, case.size), dtype=np.uint8)
    for start in range(0, len(payloads), CHUNK):
        for row, payload in enumerate(payloads[start : start + CHUNK]):
            assert png.inflate(payload, rows[:, row])
        png.unfilter(rows, images)


def bare_pillow(payloads: list[bytes]) -> None:
    """What every loader pays that decodes with Pillow."""
    for payload in payloads:
        with Image.open(io.BytesIO(payload)) as image:
            np.asarray(image)


def open_shards(dataset: ShardDataset) -> list[int]:
    """File descriptors of all shards; they stay open to the end of the process."""
    return [os.open(Path(dataset.place, shard.file), os.O_RDONLY) for shard in dataset.manifest.shards]


def read_payloads(dataset: ShardDataset, order: NDArray[np.int64]) -> list[bytes]:
    """The stored bytes of all images, in this order."""
    files = open_shards(dataset)
    places = (column[order].tolist() for column in (dataset.index.shard, dataset.index.size, dataset.index.offset))
    return [os.pread(files[shard], size, offset) for shard, size, offset in zip(*places, strict=True)]


def bare_read(dataset: ShardDataset, case: Case, order: NDArray[np.int64]) -> Callable[[], None]:
    """Reading the pixels of an epoch into as many batches as are kept, all that can be prepared being prepared."""
    files = open_shards(dataset)
    pixels = case.size**2 * 3
    header = dataset.index.size[order] - pixels
    batches = np.empty((KEPT * BATCH, 3, case.size, case.size), dtype=np.uint8)
    rows = cycle([[row.data.cast("B")] for row in batches])
    offsets = (dataset.index.offset[order] + header).tolist()
    descriptors = [files[shard] for shard in dataset.index.shard[order].tolist()]
    reads = list(zip(descriptors, rows, offsets, strict=False))

    def epoch() -> None:
        for file, row, offset in reads:
            os.preadv(file, row, offset)

    return epoch


def webdataset_epoch(dataset: ShardDataset, case: Case) -> Callable[[], None]:
    """The stock pipeline, as its documentation has it."""
    import webdataset

    shards = [str(Path(dataset.place, shard.file)) for shard in dataset.manifest.shards]
    pipeline = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=SEED).shuffle(1000)
    pipeline = pipeline.decode() if case.extension == "npy" else pipeline.decode("rgb8")
    pipeline = pipeline.to_tuple(case.extension, "cls").batched(BATCH)

    def epoch() -> None:
        count = sum(len(labels) for _, labels in pipeline)
        assert count == case.num

    return epoch


def streaming_epochs(peer: StreamingPeer, dataset: ShardDataset, case: Case) -> dict[str, Epoch]:
    """MosaicML Streaming, in its process."""
    column = {"npy": f"ndarray:uint8:3,{case.size},{case.size}", "png": "png", "jpg": "jpeg"}[case.extension]
    out = str(Path(dataset.place).parent / "mds")
    peer("write", shards=dataset.place, out=out, column=column)

    def epoch(indexed: bool) -> float:
        found = peer("epoch", place=out, batch=BATCH, indexed=indexed)
        assert found["count"] == case.num
        return float(found["seconds"]) / case.num

    return {"streaming": partial(epoch, False), "streaming, indexed": partial(epoch, True)}


def contestants(dataset: ShardDataset, case: Case, peer: StreamingPeer | None) -> dict[str, Epoch]:
    """All that can run on this kind of shards."""
    order = TrainStream(dataset, seed=SEED, random_flip=False).order.epoch(0)
    work: dict[str, Callable[[], object]] = {
        "ours": our_epochs(dataset, random_flip=False),
        "ours, flips": our_epochs(dataset, random_flip=True),
        "step inputs": step_input_epochs(dataset, case),
    }
    if case.encoding == "npy":
        work["bare read"] = bare_read(dataset, case, order)
    else:
        payloads = read_payloads(dataset, order)
        work["bare decode"] = lambda: bare_decode(case, payloads)
        work["bare Pillow"] = lambda: bare_pillow(payloads)
    work["webdataset"] = webdataset_epoch(dataset, case)
    epochs: dict[str, Epoch] = {name: partial(timed, call, case.num) for name, call in work.items()}
    if peer is not None:
        epochs |= streaming_epochs(peer, dataset, case)
    return epochs


def race(epochs: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Seconds an image of every round; one round before them warms everything up."""
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    names = list(epochs)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:  # another one begins each round
            took = epochs[name]()
            if number > 0:
                seconds[name].append(took)
    return seconds


@dataclass(frozen=True)
class Row:
    """One kind of shards."""

    case: str
    num: int
    stored_share: float  # stored bytes over bytes of pixels
    microseconds: dict[str, float]  # an image, medians over the rounds
    limit: str
    share_of_limit: float  # the limit's time over ours
    times_faster: dict[str, float]  # than each peer
    two_threads: dict[str, float]  # wall time of one thread over that of two, CPU time of two over that of one
    rounds: dict[str, list[float]]  # seconds an image


def summary(name: str, num: int, stored_share: float, rounds: dict[str, list[float]], threads: dict[str, float]) -> Row:
    """Medians, and ratios of neighbours."""

    def ratio(other: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(rounds[other], rounds["ours"], strict=True))

    limit = "bare read" if "bare read" in rounds else "bare decode"
    return Row(
        case=name, num=num, stored_share=stored_share,
        microseconds={who: 1e6 * statistics.median(seconds) for who, seconds in rounds.items()},
        limit=limit, share_of_limit=ratio(limit),
        times_faster={who: ratio(who) for who in PEERS if who in rounds},
        two_threads=threads, rounds=rounds,
    )  # fmt: skip


def two_threads(dataset: ShardDataset, rounds: int) -> dict[str, float]:
    """What a second decoding thread brings and costs."""
    epochs = {number: our_epochs(dataset, random_flip=False, num_threads=number) for number in (1, 2)}
    walls, processor = [], []
    for _ in range(rounds + 1):
        took = []
        for epoch in epochs.values():
            wall, cpu = time.perf_counter(), time.process_time()
            epoch()
            took.append((time.perf_counter() - wall, time.process_time() - cpu))
        walls.append(took[0][0] / took[1][0])
        processor.append(took[1][1] / took[0][1])
    return {"speedup": statistics.median(walls[1:]), "cpu_ratio": statistics.median(processor[1:])}


def measure(name: str, images: Images, labels: NDArray[np.int64], peer: StreamingPeer | None, rounds: int) -> Row:
    """Write the shards, let everybody run."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_split(
            Path(folder, "train"), images[: case.num], labels[: case.num], case.encode, case.encoding,
            extension=case.extension, num_shards=NUM_SHARDS,
        )  # fmt: skip
        seconds = race(contestants(dataset, case, peer), rounds)
        stored = float(dataset.index.size.sum()) / images[: case.num].nbytes
        return summary(name, case.num, stored, seconds, two_threads(dataset, rounds))


def memory_of(folder: Path) -> list[dict[str, float]]:
    """Memory of this process before the first and after every epoch."""
    found = [memory_mib()]
    epoch = our_epochs(ShardDataset(folder), random_flip=True, num_threads=2)
    for _ in range(MEMORY_EPOCHS):
        epoch()
        found.append(memory_mib())
    return found


def measure_memory(images: Images, labels: NDArray[np.int64], name: str) -> list[dict[str, float]]:
    """The same in a process of its own."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        write_split(
            Path(folder, "train"), images, labels, case.encode, case.encoding, extension=case.extension,
            num_shards=NUM_SHARDS,
        )  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.data_throughput", "--memory-of", f"{folder}/train"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"ten epochs failed:\n{done.stderr[-3000:]}")
    epochs: list[dict[str, float]] = json.loads(done.stdout)
    return epochs


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help=f"a prepared split of photographs (default {DEFAULT_DATA}, if there)")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streaming-python", type=Path, help="interpreter of an environment with MosaicML Streaming")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)  # what this script starts itself as
    options = parser.parse_args(arguments)
    if options.memory_of is not None:
        print(json.dumps(memory_of(options.memory_of)))
        return 0
    names = options.cases.split(",")
    for name in names:
        if name not in CASES:
            raise UserError(f"--cases {name!r} is unknown; choose from {', '.join(CASES)}.")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds} measures nothing; use 1 or more.")
    place = options.data or (DEFAULT_DATA if DEFAULT_DATA.exists() else None)
    peer = StreamingPeer(options.streaming_python) if options.streaming_python else None
    report(names, place, peer, options.rounds, options.json)
    return 0


def report(names: list[str], place: Path | None, peer: StreamingPeer | None, rounds: int, out: Path | None) -> None:
    """Measure, print as it goes, and write the JSON file."""
    print("images: " + (f"mosaics of {place}" if place else "generated, as there is no --data"))
    print("MosaicML Streaming " + (peer.version if peer else "is left out: see --streaming-python"))

    @cache
    def photos(size: int) -> tuple[Images, NDArray[np.int64]]:
        return photographs(place, max(case.num for case in CASES.values() if case.size == size), size)

    rows = []
    for name in names:
        rows.append(measure(name, *photos(CASES[name].size), peer, rounds))
        print_row(rows[-1])
    memory = measure_memory(*photos(CASES[MEMORY_CASE].size), MEMORY_CASE)
    print(
        f"\n{MEMORY_CASE}, memory: "
        + " ".join(f"{epoch['pss']:.1f}" for epoch in memory)
        + " MiB (PSS) over ten epochs"
    )
    if peer is not None:
        peer.close()
    if out is not None:
        found: dict[str, Any] = {
            "machine": machine(),
            "images": "generated" if place is None else "mosaics",
            "batch": BATCH,
        }
        found["streaming"] = peer.version if peer else None
        write_json(out, found | {"rows": [asdict(row) for row in rows], "memory_mib": memory})


def print_row(row: Row) -> None:
    """A paragraph of the table."""
    print(f"\n{row.case}, {row.num:,} images of {row.stored_share:.0%} of their raw size: CPU µs an image")
    print("  " + ", ".join(f"{who} {value:.1f}" for who, value in row.microseconds.items()))
    faster = ", ".join(f"{value:.1f} times as fast as {who}" for who, value in row.times_faster.items())
    print(f"  {row.share_of_limit:.0%} of {row.limit}; {faster}")
    gain = "two threads: {speedup:.2f} times as fast, {cpu_ratio:.2f} of the CPU time"
    print("  " + gain.format(**row.two_threads), flush=True)


def machine() -> str:
    """Of the results, in words."""
    import torch  # not above: it would lie in the memory that is measured

    from benchmarks.unet_step import machine

    return machine(torch.device("cpu"))


if __name__ == "__main__":
    run_cli(main)
