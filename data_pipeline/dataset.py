"""Random access to the samples of one data split."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from data_pipeline import codec, manifest, npy, png
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.index import Index, shown
from data_pipeline.manifest import Manifest
from data_pipeline.shard_files import ShardFiles, open_files
from data_pipeline.storage import is_url

if TYPE_CHECKING:
    from data_pipeline.shard_cache import CacheSettings

MAX_OPEN_SHARDS = 512  # twice what a window of the shuffle spans where a shard has 1,000 samples
_CHUNK = 32  # images decoded together: they fit into a core's cache


class DamagedSampleError(DataError):
    """One sample's bytes are not what they were: `what` names its shard and key; the text has the remedy too."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what

    def __str__(self) -> str:
        return " ".join(self.args)


@dataclass(frozen=True)
class Samples:
    """What was read; a damaged sample's image is undefined."""

    images: NDArray[np.uint8]  # [n, C, H, W]
    labels: NDArray[np.int64]  # [n], -1 where unlabelled
    damaged: dict[int, DamagedSampleError]  # by row


class ShardDataset:
    """The images and labels of a split, by sample number 0 .. len - 1 (the order of the shards).

    `place` is a folder or a URL. May be read by several threads at once, and after a fork. Reading checks the stored
    crc32 of every image.

    Raises:
        DataError: there is no complete split: names what is missing or wrong, and the command that mends it.
    """

    def __init__(self, place: str | Path, cache: CacheSettings | None = None) -> None:
        files = open_files(place, cache)
        described = files.manifest()
        path = files.index(described)
        check_index(path, described, str(place))
        self._start(str(place), cache, described, path)
        check_shards(self.files, described, self.place)

    def _start(self, place: str, cache: CacheSettings | None, described: Manifest, index: Path) -> None:
        self.place, self.manifest, self.index = place, described, Index.open(index)
        self.files = open_files(described.shards_at or place, cache)
        # Open shards cannot leave the cache of a remote split.
        num_open = self.files.max_bytes // (2 * max(shard.num_bytes for shard in described.shards)) + 1
        self._open = lru_cache(maxsize=int(min(MAX_OPEN_SHARDS, num_open)))(self._open_shard)
        self._mending = threading.Lock()
        self._mended: dict[int, bool] = {}  # by shard with damaged samples: whether its copy was at fault
        self._state = (place, cache, described, index)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._state  # another process opens the files for itself, and need not check them again

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._start(*state)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images [n, C, H, W] and labels [n] (-1 where unlabelled) of the given samples, in the given order.

        Raises:
            DamagedSampleError: a sample is damaged; names its shard and key.
        """
        samples = self.read_all(indices)
        for error in samples.damaged.values():
            raise error
        return samples.images, samples.labels

    def read_all(self, indices: NDArray[np.int64]) -> Samples:
        """The given samples, in the given order, and which of them are damaged."""
        size, num_channels = self.manifest.image_size, self.manifest.num_channels
        images = np.empty((len(indices), num_channels, size, size), dtype=np.uint8)
        damaged = self._read_rows(indices, images)
        if damaged and self.is_remote:
            again = np.array(
                [row for row in damaged if self._has_new_copy(int(self.index.shard[indices[row]]))], np.int64
            )
            fresh = np.empty((len(again), *images.shape[1:]), dtype=np.uint8)
            still = self._read_rows(indices[again], fresh)
            images[again] = fresh
            damaged = {row: what for row, what in damaged.items() if row not in again}
            damaged |= {int(again[row]): what for row, what in still.items()}
        return Samples(
            images,
            self.index.label[indices],
            {row: self._damaged(int(indices[row]), what) for row, what in sorted(damaged.items())},
        )

    def _read_rows(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> dict[int, str]:
        """Fill `images` [n, C, H, W]; returns the damaged rows and what is wrong with them."""
        damaged: dict[int, str] = {}
        read = {"png": self._read_png, "npy": self._read_npy, "any": self._read_any}[self.manifest.encoding]
        step = _CHUNK if self.manifest.encoding == "png" else max(len(indices), 1)
        for start in range(0, len(indices), step):
            chunk = slice(start, start + step)
            damaged |= {start + row: what for row, what in read(indices[chunk], images[chunk])}
        return damaged

    def _has_new_copy(self, shard: int) -> bool:
        """Whether a shard's local copy was at fault for a damaged sample, and is gone."""
        with self._mending:
            if shard not in self._mended:
                self._mended[shard] = self.files.drop_bad_copy(self.manifest.shards[shard])
                self._open.cache_clear()
            return self._mended[shard]

    @property
    def is_remote(self) -> bool:
        """Whether shards must travel before they are read."""
        return is_url(self.manifest.shards_at or self.place)

    def check_cache(self, window: int) -> None:
        """Check that the cache of a remote split holds the shards that a shuffle over `window` samples reads at a time.

        Raises:
            DataError: it does not, so that shards would be fetched again and again.
        """
        sizes = [shard.num_bytes for shard in self.manifest.shards]
        # Twice what is being read: half of the cache is for what has been fetched ahead.
        needed = min(sum(sizes) + max(sizes), 2 * (int(sum(sizes) * window / len(self)) + 2 * max(sizes)))
        if self.is_remote and needed > self.files.max_bytes:
            raise DataError(
                f"the shuffle needs {needed / 1e9:.3g} GB of shards at hand (data.shuffle_window={window:,} of "
                f"{len(self):,} samples), the cache may hold {self.files.max_bytes / 1e9:.3g} GB: set "
                f"data.remote.cache_gb to {1.01 * needed / 1e9:.3g} or more, or data.shuffle_window lower."
            )

    def prefetch(self, shards: list[int]) -> None:
        """Say which shards will be read next, by number: those of a remote split begin to travel."""
        self.files.prefetch([self.manifest.shards[number] for number in shards])

    def close(self) -> None:
        """End what runs in the background."""
        self.files.close()

    def _read_png(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> Iterator[tuple[int, str]]:
        """Decode samples into `images` [n, C, H, W]; gives the damaged rows and what is wrong with them."""
        rows = png.empty_rows(len(indices), *images.shape[2:])
        others = []  # written by another program: in another form of PNG
        for row, payload in enumerate(self._payloads(indices)):
            if payload is None:
                yield row, _WRONG_SUM
                continue
            try:
                if not png.inflate(payload, rows[:, row]):
                    others.append((row, payload))
            except ValueError as error:
                yield row, f"it cannot be decoded ({error})"
        if len(others) < len(indices):
            png.unfilter(rows, images)
        for row, payload in others:
            yield from self._decoded(row, payload, images)

    def _read_any(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> Iterator[tuple[int, str]]:
        for row, payload in enumerate(self._payloads(indices)):
            if payload is None:
                yield row, _WRONG_SUM
            else:
                yield from self._decoded(row, payload, images)

    def _read_npy(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> Iterator[tuple[int, str]]:
        """As `_read_png`; from the file to its place in the batch without a copy between."""
        # The header is not read: the checksum is right only for this one.
        header = npy.header(*images.shape[1:])
        header_sum = isal_zlib.crc32(header)
        pixels, room = images.reshape(-1).data, images[0].size if len(images) else 0
        index = self.index
        offsets, sums = (index.offset[indices] + len(header)).tolist(), index.crc32[indices].tolist()
        files = self._open_files(indices)
        for row, (file, offset, crc32) in enumerate(zip(files, offsets, sums, strict=True)):
            image = pixels[row * room : (row + 1) * room]
            if os.preadv(file.fd, (image,), offset) != room or isal_zlib.crc32(image, header_sum) != crc32:
                yield row, _WRONG_SUM

    def _decoded(self, row: int, payload: bytes, images: NDArray[np.uint8]) -> Iterator[tuple[int, str]]:
        try:
            image = codec.decode(payload, self.manifest.encoding)
        except (ValueError, OSError, SyntaxError) as error:
            yield row, f"it cannot be decoded ({error})"
            return
        size = self.manifest.image_size
        if image.shape != (size, size, self.manifest.num_channels):
            yield row, f"it is {image.shape[1]}x{image.shape[0]}, the manifest says {size}x{size}"
            return
        images[row] = image.transpose(2, 0, 1)

    def _payloads(self, indices: NDArray[np.int64]) -> Iterator[bytes | None]:
        """The stored bytes of the given samples' images; None where they do not match their crc32."""
        columns = (getattr(self.index, name)[indices].tolist() for name in ("offset", "size", "crc32"))
        for file, offset, size, crc32 in zip(self._open_files(indices), *columns, strict=True):
            payload = os.pread(file.fd, size, offset)
            yield payload if isal_zlib.crc32(payload) == crc32 else None

    def _open_files(self, indices: NDArray[np.int64]) -> list[_OpenFile]:
        """The open shard of each of the given samples; who holds the list keeps them open."""
        shards = self.index.shard[indices].tolist()
        files = {shard: self._open(shard) for shard in set(shards)}
        return [files[shard] for shard in shards]

    def shard_place(self, number: int) -> str:
        """Path or URL of a shard, for messages."""
        return _place_of(self.manifest, self.place, self.manifest.shards[number].file)

    def _damaged(self, sample: int, what: str) -> DamagedSampleError:
        key = shown(self.index.key[sample])
        shard = int(self.index.shard[sample])
        return DamagedSampleError(
            f"{self.shard_place(shard)}: sample {key} is damaged: {what}.",
            f"See how far it goes: python -m data_pipeline.inspect {self.place} --verify. "
            f"{manifest.remedy(self.place, self.manifest.source)}",
        )

    def _open_shard(self, number: int) -> _OpenFile:
        try:
            return _OpenFile(self.files.open(self.manifest.shards[number]))
        except FileNotFoundError:
            remedy = manifest.remedy(self.place, self.manifest.source)
            raise DataError(
                f"shard {self.shard_place(number)} is missing; it was there at the start. {remedy}"
            ) from None


_WRONG_SUM = "its bytes do not match their checksum"


class _OpenFile:
    """A shard that stays open as long as somebody holds it, even when it is not or no longer in the cache."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def check_shards(files: ShardFiles, described: Manifest, place: str) -> None:
    """Check that every shard is there with the right size.

    Raises:
        DataError: names the first that is not, and how many others.
    """
    sizes = files.sizes([shard.file for shard in described.shards])
    wrong = [shard for shard in described.shards if sizes[shard.file] != shard.num_bytes]
    if wrong:
        first, found = wrong[0], sizes[wrong[0].file]
        what = "is missing" if found is None else f"has {found:,} bytes instead of {first.num_bytes:,}"
        others = f" ({len(wrong) - 1} more of {len(described.shards)} shards too)" if len(wrong) > 1 else ""
        remedy = manifest.remedy(place, described.source)
        raise DataError(f"shard {_place_of(described, place, first.file)} {what}{others}. {remedy}")


def _place_of(described: Manifest, place: str, file: str) -> str:
    return f"{(described.shards_at or place).rstrip('/')}/{file}"


def check_index(path: Path, described: Manifest, place: str) -> None:
    """Check that the index is the one that the manifest was written with.

    Raises:
        DataError: it is missing, damaged or another one.
    """
    remedy = manifest.remedy(place, described.source)
    try:
        found = sha256_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing. {remedy}") from None
    if found != described.index_sha256:
        raise DataError(f"{path} is damaged: its sha256 is {found}, expected {described.index_sha256}. {remedy}")
    counts = np.bincount(Index.open(path).shard, minlength=len(described.shards)).tolist()
    if counts != [shard.num_samples for shard in described.shards]:
        raise DataError(f"{path} and the manifest beside it do not belong together. {remedy}")
