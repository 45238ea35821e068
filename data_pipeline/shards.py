"""Writes samples as tar shards that any WebDataset reader can read.

The same samples always give the same bytes: no times, no user names, members in a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import codec
from data_pipeline.files import sha256_file
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.index import NO_LABEL, Index, Member, build_index, scan_shard
from data_pipeline.manifest import Shard

_BLOCK = 512  # tar's unit: a header is one block, payloads are padded to whole blocks


@dataclass(frozen=True)
class EncodedSample:
    """A sample ready to be written; made independently of all others."""

    key: str
    payload: bytes
    label: int
    digest: bytes

    @property
    def tar_bytes(self) -> int:
        """The room it takes in a shard."""
        label_bytes = 0 if self.label == NO_LABEL else 2 * _BLOCK
        return _BLOCK + -(-len(self.payload) // _BLOCK) * _BLOCK + label_bytes


@dataclass(frozen=True)
class WrittenSplit:
    """What lies on the disk after `write_shards`."""

    shards: list[Shard]
    index: Index
    fingerprint: str


def encode_sample(position: int, image: NDArray[np.uint8], label: int) -> EncodedSample:
    """Encode an image [H, W, 3]; `position` is its place in the source and gives its key."""
    return EncodedSample(f"{position:09d}", codec.encode(image), label, sample_digest(image, label))


def write_shards(samples: Iterable[EncodedSample], folder: Path, *, shard_bytes: int) -> WrittenSplit:
    """Write samples in their order into shards of about `shard_bytes`; the last may be smaller."""
    digests: list[bytes] = []
    members: list[list[Member]] = []
    shards: list[Shard] = []
    for number, group in enumerate(_groups(samples, shard_bytes)):
        path = folder / f"shard-{number:06d}.tar"
        _write_shard(group, path)
        # Read back at once, while it is in the page cache: the index says what really lies there.
        found = list(scan_shard(path, codec.EXTENSION))
        assert [member.key for member in found] == [sample.key for sample in group]
        members.append(found)
        digests += [sample.digest for sample in group]
        shards.append(
            Shard(file=path.name, num_samples=len(found), num_bytes=path.stat().st_size, sha256=sha256_file(path))
        )
    return WrittenSplit(shards, build_index(members), fingerprint(digests))


def _groups(samples: Iterable[EncodedSample], shard_bytes: int) -> Iterator[list[EncodedSample]]:
    group: list[EncodedSample] = []
    num_bytes = 0
    for sample in samples:
        group.append(sample)
        num_bytes += sample.tar_bytes
        if num_bytes >= shard_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _write_shard(group: list[EncodedSample], path: Path) -> None:
    from webdataset import TarWriter  # takes seconds to import, and most commands write nothing

    with open(path, "wb") as file:
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for sample in group:
                members: dict[str, str | bytes] = {"__key__": sample.key, codec.EXTENSION: sample.payload}
                if sample.label != NO_LABEL:
                    members["cls"] = str(sample.label).encode()
                tar.write(members)
        file.flush()
        os.fsync(file.fileno())
