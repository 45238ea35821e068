"""Random access to the samples of one data split."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import codec, index, manifest
from data_pipeline.errors import DataError
from data_pipeline.index import Index
from data_pipeline.manifest import Manifest

MAX_OPEN_SHARDS = 256


class ShardDataset:
    """The images and labels of a prepared split, by sample number 0 .. len - 1 (the order of the shards).

    May be read by several threads at once, and after a fork. Reading checks the stored crc32 of every image.

    Raises:
        DataError: the folder is no complete split: names what is missing or wrong, and the command that mends it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        check_shards(self.folder, self.manifest)
        self.index = load_index(self.folder, self.manifest)
        self._open = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images [n, C, H, W] and labels [n] (-1 where unlabelled) of the given samples, in the given order.

        Raises:
            DataError: a sample is damaged; names its shard and key.
        """
        size = self.manifest.image_size
        images = np.empty((len(indices), size, size, self.manifest.num_channels), dtype=np.uint8)  # [n, H, W, C]
        for row, (sample, payload) in enumerate(zip(indices.tolist(), self.payloads(indices), strict=True)):
            images[row] = self._decoded(sample, payload)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.index.label[indices]

    def payloads(self, indices: NDArray[np.int64]) -> Iterator[bytes]:
        """The stored (encoded) bytes of the given samples' images, checked against their crc32."""
        columns = (indices, *(getattr(self.index, name)[indices] for name in ("shard", "offset", "size", "crc32")))
        for sample, shard, offset, size, crc32 in zip(*(column.tolist() for column in columns), strict=True):
            payload = self._open(shard).read(size, offset)
            if zlib.crc32(payload) != crc32:
                raise self._damaged(sample, "its bytes do not match their checksum")
            yield payload

    def _decoded(self, sample: int, payload: bytes) -> NDArray[np.uint8]:
        try:
            image = codec.decode(payload)
        except (ValueError, OSError, SyntaxError) as error:
            raise self._damaged(sample, f"it cannot be decoded ({error})") from None
        size = self.manifest.image_size
        if image.shape != (size, size, self.manifest.num_channels):
            raise self._damaged(sample, f"it is {image.shape[1]}x{image.shape[0]}, the manifest says {size}x{size}")
        return image

    def _damaged(self, sample: int, what: str) -> DataError:
        shard = self.folder / self.manifest.shards[int(self.index.shard[sample])].file
        key = self.index.key[sample].decode()
        return DataError(
            f"{shard}: sample {key} is damaged: {what}. See how far it goes: python -m data_pipeline.inspect "
            f"{self.folder} --verify. {manifest.remedy(self.folder, self.manifest.source)}"
        )

    def _open_shard(self, number: int) -> _OpenFile:
        return _OpenFile(self.folder / self.manifest.shards[number].file)


class _OpenFile:
    """A shard that stays open as long as somebody reads from it, even when it is not or no longer in the cache."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        # In here `self` is alive: a caller that held nothing but the number could find it closed.
        return os.pread(self._fd, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def check_shards(folder: Path, described: Manifest) -> None:
    """Check that every shard is there with the right size.

    Raises:
        DataError: names the first that is not, and how many others.
    """
    problems = []
    for shard in described.shards:
        path = folder / shard.file
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            problems.append(f"shard {path} is missing")
            continue
        if found != shard.num_bytes:
            problems.append(f"shard {path} has {found:,} bytes instead of {shard.num_bytes:,}")
    if problems:
        others = f" ({len(problems) - 1} more of {len(described.shards)} shards too)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{others}. {manifest.remedy(folder, described.source)}")


def load_index(folder: Path, described: Manifest) -> Index:
    """Read the split's index.

    Raises:
        DataError: it is missing or not the one that the manifest was written with.
    """
    path = folder / index.FILE_NAME
    remedy = manifest.remedy(folder, described.source)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing. {remedy}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != described.index_sha256:
        raise DataError(f"{path} is damaged: its sha256 is {found}, expected {described.index_sha256}. {remedy}")
    loaded = Index.from_bytes(content)
    counts = np.bincount(loaded.shard, minlength=len(described.shards)).tolist()
    if counts != [shard.num_samples for shard in described.shards]:
        raise DataError(f"{path} and the manifest beside it do not belong together. {remedy}")
    return loaded
