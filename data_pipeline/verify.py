"""Checks all that a split says of itself: every shard's sha256, every image's crc32 and pixels, the fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.dataset import ShardDataset
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.processes import WorkerPool
from data_pipeline.progress import progress_bar

_READ_BYTES = 1 << 20  # of a file at a time
_CHUNK_BYTES = 1 << 23  # of decoded pixels at a time
_SHOWN = 5  # damaged images of a shard that are named


@dataclass(frozen=True)
class _Found:
    """What a shard holds."""

    sha256: str
    damaged: list[str]  # a line a sample
    digests: bytes  # of the others, in order


def verify(dataset: ShardDataset, *, num_processes: int = 1) -> list[str]:
    """Check a split; returns what is wrong, an entry a damaged shard, and no entry where all is right."""
    shards = dataset.manifest.shards
    numbers = {shard.file: number for number, shard in enumerate(shards)}
    starts = np.cumsum([0, *(shard.num_samples for shard in shards)]).tolist()
    problems: list[str] = []

    def check(file: str) -> _Found:
        return _read_shard(dataset, numbers[file], range(*starts[numbers[file] :][:2]))

    def digests() -> Iterator[bytes]:
        with WorkerPool(check, min(num_processes, len(shards))) as pool, progress_bar(
            total=len(dataset), unit="img", description="verify"
        ) as bar:  # fmt: skip
            for shard, found in zip(shards, pool.map(numbers), strict=True):
                bar.update(shard.num_samples)
                what = [f"sha256 is {found.sha256}, expected {shard.sha256}"] if found.sha256 != shard.sha256 else []
                if found.damaged:
                    what.append(f"{len(found.damaged):,} of {shard.num_samples:,} images damaged:")
                    what[-1] += _listed(found.damaged)
                if what:
                    problems.append(f"{dataset.shard_place(numbers[shard.file])}: {'; '.join(what)}")
                yield found.digests

    found = fingerprint(digests())
    if not problems and found != dataset.manifest.fingerprint:
        problems.append(f"{dataset.place}: the pixels or labels are not those of the manifest's fingerprint")
    return problems


def _read_shard(dataset: ShardDataset, number: int, samples: range) -> _Found:
    """Read a shard twice: as a file, and its samples."""
    manifest = dataset.manifest
    sha256 = hashlib.sha256()
    with os.fdopen(dataset.files.open(manifest.shards[number]), "rb") as file:
        while block := file.read(_READ_BYTES):
            sha256.update(block)
    damaged: list[str] = []
    digests: list[bytes] = []
    step = max(1, _CHUNK_BYTES // (manifest.num_channels * manifest.image_size**2))
    for start in range(samples.start, samples.stop, step):
        read = dataset.read_all(np.arange(start, min(start + step, samples.stop)))
        for row, (image, label) in enumerate(zip(read.images, read.labels.tolist(), strict=True)):
            if row in read.damaged:
                damaged.append(read.damaged[row].what.removeprefix(f"{dataset.shard_place(number)}: "))
            else:
                digests.append(sample_digest(image.transpose(1, 2, 0), label))
    return _Found(sha256.hexdigest(), damaged, b"".join(digests))


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n    {line}" for line in [*lines[:_SHOWN], *more])
