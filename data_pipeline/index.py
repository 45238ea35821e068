"""Where every sample lies: the sidecar index that turns tar shards into randomly readable storage.

`index.npz` holds one row a sample, in the order of the shards: its key, shard number, byte offset and size of the
image payload, crc32 of the payload, and label. It is built by reading the tar files themselves, so any tar shards
in the WebDataset layout can be given one. No pickle is involved.

Its columns are used where they lie, mapped into memory: all processes of a machine share one copy, and a million
samples are ready at once.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from data_pipeline import tar
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from data_pipeline.zipped import content_offset, mapped_array

FILE_NAME = "index.npz"
NO_LABEL = -1
MAX_CLASSES = 1_000_000  # a label beyond is damage: the manifest names every class


@dataclass(frozen=True)
class Index:
    """One row a sample; all arrays are [num_samples]."""

    key: NDArray[np.bytes_]  # UTF-8, as a rule: see `shown`
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
    def open(cls, path: Path) -> Index:
        """The index in a file, mapped into memory (the file may be replaced meanwhile, but not written to).

        Raises:
            ValueError: the file is no such index.
            OSError: it cannot be read.
        """
        try:
            columns = {name.removesuffix(".npy"): column for name, column in _mapped_columns(path)}
            index = cls(**{field.name: columns[field.name] for field in fields(cls)})
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from None
        if len({getattr(index, field.name).shape for field in fields(cls)}) != 1:
            raise ValueError("its columns differ in length")
        return index


def _mapped_columns(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of an uncompressed npz file, by name, without reading them."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            yield entry.filename, mapped_array(path, content_offset(file, entry), entry.compress_size)


@dataclass(frozen=True)
class Member:
    """A sample as found in a tar shard."""

    key: str  # bytes that are not UTF-8 as lone surrogates (surrogateescape)
    offset: int
    size: int
    crc32: int
    label: int


def scan_shard(path: Path, extensions: tuple[str, ...]) -> Iterator[Member]:
    """The samples of a tar shard, in order: members `KEY.<extension>` with an optional `KEY.cls` beside them.

    A key is a path up to the first dot of its last part, as for WebDataset; other members are passed over.

    Raises:
        DataError: the file is no complete tar, a label has no image or is no class number, or a sample has two images.
    """
    labels: dict[str, int] = {}  # of samples whose image has not come yet
    images: dict[str, Member] = {}  # of samples whose label has not come yet
    try:
        with open(path, "rb") as file:
            for name, offset, size in tar.walk(file):
                folder, slash, base = name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, kind = folder + slash + stem, kind.lower()
                if kind not in (*extensions, "cls"):
                    continue
                # A sample's members are neighbours: one with another key ends it.
                yield from _finished(images, key)
                file.seek(offset)
                payload = file.read(size)
                if kind == "cls":
                    labels[key] = _label(payload, key)
                elif key in images:
                    raise ValueError(f"sample {key} has more than one image")
                else:
                    images[key] = Member(key, offset, size, isal_zlib.crc32(payload), NO_LABEL)
                if key in images and key in labels:
                    images[key] = replace(images[key], label=labels.pop(key))
            yield from _finished(images, None)
    except ValueError as error:
        raise DataError(f"{path} is damaged or no tar file: {shown(str(error))}.") from None
    if labels:
        raise DataError(
            f"{path}: sample {shown(next(iter(labels)))} has a label but no image ({', '.join(extensions)})."
        )


def _label(payload: bytes, key: str) -> int:
    try:
        label = int(payload)
    except ValueError:
        raise ValueError(f"the label of sample {key} is no number: {payload[:40]!r}") from None
    if abs(label) >= MAX_CLASSES:
        raise ValueError(f"sample {key} has label {payload[:40]!r}; classes are counted from 0 to {MAX_CLASSES - 1:,}")
    return label


def shown(key: str | bytes) -> str:
    """A key for messages, which can be printed whatever bytes it holds."""
    raw = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    return raw.decode("utf-8", "backslashreplace")


def _finished(images: dict[str, Member], current: str | None) -> Iterator[Member]:
    for key in [key for key in images if key != current]:
        yield images.pop(key)


def build_index(shards: Sequence[Sequence[Member]]) -> Index:
    """The index of shards, from what `scan_shard` found in each."""
    rows = [(number, member) for number, members in enumerate(shards) for member in members]

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array([getattr(member, name) for _, member in rows], dtype=dtype)

    return Index(
        key=np.array([member.key.encode("utf-8", "surrogateescape") for _, member in rows], dtype=np.bytes_),
        shard=np.array([number for number, _ in rows], dtype=np.int32),
        offset=column("offset", np.int64),
        size=column("size", np.int64),
        crc32=column("crc32", np.uint32),
        label=column("label", np.int64),
    )
