"""Where every sample lies: the sidecar index that turns tar shards into randomly readable storage.

`index.npz` holds one row a sample, in the order of the shards: its key, shard number, byte offset and size of the
image payload, crc32 of the payload, and label. It is built by reading the tar files themselves, so any tar shards
in the WebDataset layout can be given one. No pickle is involved.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic

FILE_NAME = "index.npz"
NO_LABEL = -1


@dataclass(frozen=True)
class Index:
    """One row a sample; all arrays are [num_samples]."""

    key: NDArray[np.bytes_]
    shard: NDArray[np.int32]  # number of the shard, ascending
    offset: NDArray[np.int64]  # of the image payload in the shard, bytes
    size: NDArray[np.int64]  # of the image payload, bytes
    crc32: NDArray[np.uint32]  # of the image payload
    label: NDArray[np.int64]  # NO_LABEL where unlabelled

    def __len__(self) -> int:
        return len(self.shard)

    def to_bytes(self) -> bytes:
        """The content of index.npz; equal indices give equal bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        return buffer.getvalue()

    def save(self, folder: Path) -> bytes:
        """Write index.npz atomically; returns its content (for the checksum in the manifest)."""
        content = self.to_bytes()
        write_atomic(folder / FILE_NAME, content)
        return content

    @classmethod
    def from_bytes(cls, content: bytes) -> Index:
        """Rebuild an index.

        Raises:
            ValueError: the content is no such index.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                index = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from None
        if len({getattr(index, field.name).shape for field in fields(cls)}) != 1:
            raise ValueError("its columns differ in length")
        return index


@dataclass(frozen=True)
class Member:
    """A sample as found in a tar shard."""

    key: str
    offset: int
    size: int
    crc32: int
    label: int


def scan_shard(path: Path, extension: str) -> Iterator[Member]:
    """The samples of a tar shard, in order: members `KEY.<extension>` with an optional `KEY.cls` beside them.

    Raises:
        DataError: the file is no complete tar, or a label has no image.
    """
    labels: dict[str, int] = {}  # of samples whose image has not come yet
    images: dict[str, Member] = {}  # of samples whose label has not come yet
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                if not member.isfile() or kind not in (extension, "cls"):
                    continue
                # A sample's members are neighbours: one with another key ends it.
                yield from _finished(images, key)
                file.seek(member.offset_data)
                payload = file.read(member.size)
                if kind == "cls":
                    labels[key] = int(payload)
                else:
                    images[key] = Member(key, member.offset_data, member.size, zlib.crc32(payload), NO_LABEL)
                if key in images and key in labels:
                    images[key] = replace(images[key], label=labels.pop(key))
            yield from _finished(images, None)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged or no tar file: {error}.") from None
    if labels:
        raise DataError(f"{path}: sample {next(iter(labels))} has a label but no .{extension} image.")


def _finished(images: dict[str, Member], current: str | None) -> Iterator[Member]:
    for key in [key for key in images if key != current]:
        yield images.pop(key)


def build_index(shards: Sequence[Sequence[Member]]) -> Index:
    """The index of shards, from what `scan_shard` found in each."""
    rows = [(number, member) for number, members in enumerate(shards) for member in members]

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array([getattr(member, name) for _, member in rows], dtype=dtype)

    return Index(
        key=np.array([member.key.encode() for _, member in rows], dtype=np.bytes_),
        shard=np.array([number for number, _ in rows], dtype=np.int32),
        offset=column("offset", np.int64),
        size=column("size", np.int64),
        crc32=column("crc32", np.uint32),
        label=column("label", np.int64),
    )
