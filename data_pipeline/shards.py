"""Writes samples as tar shards that any WebDataset reader can read.

The same samples always give the same bytes: no times, no user names, members in a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import codec, tar
from data_pipeline.codec import Encoding
from data_pipeline.files import sha256_file
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.index import NO_LABEL, Index, build_index, scan_shard
from data_pipeline.manifest import Shard


@dataclass(frozen=True)
class EncodedSample:
    """A sample ready to be written; made independently of all others."""

    key: str
    payload: bytes
    label: int
    digest: bytes
    extension: str  # of the payload's member in the tar

    @property
    def tar_bytes(self) -> int:
        """The room it takes in a shard."""
        return sum(tar.BLOCK + len(content) + -len(content) % tar.BLOCK for content in self.members.values())

    @property
    def members(self) -> dict[str, bytes]:
        """Its files in the tar, by extension."""
        label = {} if self.label == NO_LABEL else {"cls": str(self.label).encode()}
        return {**label, self.extension: self.payload}


@dataclass(frozen=True)
class WrittenShard:
    """A shard that lies on the disk."""

    shard: Shard
    index: Index  # of this shard alone, as number 0
    digests: bytes  # of its samples, 32 bytes each


@dataclass(frozen=True)
class WrittenSplit:
    """All shards of a split, on the disk."""

    shards: list[Shard]
    index: Index
    fingerprint: str


def encode_sample(position: int, image: NDArray[np.uint8], label: int, encoding: Encoding = "png") -> EncodedSample:
    """Encode an image [H, W, 3]; `position` is its place in the source and gives its key."""
    payload = codec.encode(image, encoding)
    return EncodedSample(f"{position:09d}", payload, label, sample_digest(image, label), codec.EXTENSIONS[encoding][0])


def write_shards(samples: Iterable[EncodedSample], folder: Path, *, shard_bytes: int) -> WrittenSplit:
    """Write samples (at least one) in their order into shards of about `shard_bytes`; the last may be smaller."""
    return join_shards(written_shards(samples, folder, shard_bytes=shard_bytes))


def written_shards(
    samples: Iterable[EncodedSample], folder: Path, *, shard_bytes: int, first: int = 0
) -> Iterator[WrittenShard]:
    """As `write_shards`, a shard at a time; the first has number `first`.

    When a shard is given, no sample behind its last one has been taken yet.
    """
    samples = iter(samples)
    for number, sample in enumerate(samples, first):  # each shard takes the rest of its samples from the same iterator
        group = _up_to(chain([sample], samples), shard_bytes)
        yield _write_shard(group, folder / f"shard-{number:06d}.tar", sample.extension)


def join_shards(parts: Iterable[WrittenShard]) -> WrittenSplit:
    """Put shards (at least one) together, in the given order."""
    shards, indices, digests = [], [], []
    for number, part in enumerate(parts):
        shards.append(part.shard)
        indices.append(replace(part.index, shard=np.full(len(part.index), number, dtype=np.int32)))
        digests.append(part.digests)
    columns = {field.name: np.concatenate([getattr(index, field.name) for index in indices]) for field in fields(Index)}
    return WrittenSplit(shards, Index(**columns), fingerprint(digests))


def _up_to(samples: Iterable[EncodedSample], num_bytes: int) -> Iterator[EncodedSample]:
    taken = 0
    for sample in samples:
        yield sample
        taken += sample.tar_bytes
        if taken >= num_bytes:
            return


def _write_shard(samples: Iterable[EncodedSample], path: Path, extension: str) -> WrittenShard:
    """Under another name until it is complete; a part is not left behind."""
    part = path.with_name(f"{path.name}.part")
    try:
        digests = _write_tar(samples, part)
        # Read back at once, while it is in the page cache: the index says what really lies there.
        members = list(scan_shard(part, (extension,)))
        assert len(members) == len(digests)
        shard = Shard(
            file=path.name, num_samples=len(members), num_bytes=part.stat().st_size, sha256=sha256_file(part)
        )  # fmt: skip
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return WrittenShard(shard, build_index([members]), b"".join(digests))


def _write_tar(samples: Iterable[EncodedSample], path: Path) -> list[bytes]:
    """Returns the digests of the samples."""
    digests = []
    with open(path, "wb") as file:
        for sample in samples:
            for extension, content in sample.members.items():
                file.write(tar.header(f"{sample.key}.{extension}", len(content)) + content + tar.padding(len(content)))
            digests.append(sample.digest)
        file.write(tar.end_mark(file.tell()))
        file.flush()
        os.fsync(file.fileno())
    return digests
