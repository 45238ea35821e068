"""All that the metrics need of one set of images, gathered from a stream of features; memory is independent of N."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import fsync_file
from evaluation.chunks import Arrays, concatenated
from evaluation.features import FeatureNet, Features, identity_of
from evaluation.metrics.inception_score import InceptionScore
from evaluation.moments import Moments
from evaluation.statistics import FeatureIdentity, FeatureStats, read_stats, write_stats

Rows = NDArray[np.float32]

STATS_FILE = "statistics.npz"
ROWS_FILE = "rows.npy"
BLOCK = 1024  # rows in one outer product, counted from the first image: how the stream was cut does not show in sums
# Single images' features that are kept, spread over the set: all of ImageNet's would be 10 GB, and their neighbours
# would never be found.
MAX_ROWS = 50_000


@dataclass(frozen=True)
class FeatureSet:
    """The features of one set of images."""

    stats: FeatureStats
    rows: Rows | None  # [min(N, MAX_ROWS), dim] pooled features, mapped from a file; None where they are not known

    @property
    def num(self) -> int:
        """Images; 0 where a file of another project does not say."""
        return self.stats.num

    @property
    def data(self) -> str:
        """Fingerprint of the images."""
        return self.stats.data

    @property
    def identity(self) -> FeatureIdentity:
        return self.stats.identity


def feature_arrays(features: Features) -> Arrays:
    """Features as the arrays of a chunk: "pool" [n, dim] and, where the net gives them, "spatial" and "probs"."""
    named = {"pool": features.pool, "spatial": features.spatial, "probs": features.probs}
    return {name: tensor.numpy() for name, tensor in named.items() if tensor is not None}


def gather(
    net: FeatureNet, parts: Iterator[Arrays], *, data: str, num: int, folder: Path | None = None, with_rows: bool = True
) -> FeatureSet:  # fmt: skip
    """Add up the features of `num` images, which come in order, in parts of any sizes.

    Args:
        data: fingerprint of the images.
        with_rows: whether the features of single images are kept.
        folder: where rows and statistics are kept (for `read_feature_set`); None for a temporary file, which is gone
            when the result is.

    Raises:
        DataError: fewer than two images, another number than announced, features of a wrong shape or not finite.
    """
    if num < 2:
        raise DataError(f"sets of images are compared by means and covariances: at least 2 images, not {num}.")
    pool = Moments(net.dim)
    spatial = Moments(net.spatial_dim) if net.spatial_dim else None
    score = InceptionScore(num, net.num_classes) if net.num_classes else None
    with _rows_file(folder if with_rows else None) as file:
        chosen = spread(num, min(num, MAX_ROWS))
        start = _write_header(file, (len(chosen), net.dim))
        for block in in_blocks(parts):
            pool.add(block["pool"])
            if pool.num > num:
                break
            if with_rows:
                own = chosen[(chosen >= pool.num - len(block["pool"])) & (chosen < pool.num)]
                kept = block["pool"][own - (pool.num - len(block["pool"]))]
                file.write(np.ascontiguousarray(kept, dtype=np.float32).data)
            if spatial is not None:
                spatial.add(block["spatial"])
            if score is not None:
                score.add(block["probs"])
        if pool.num != num:
            raise DataError(f"features of {num} images were announced, {pool.num} or more came.")
        file.flush()
        rows: Rows | None = np.memmap(file, np.float32, "r", start, (len(chosen), net.dim)) if with_rows else None
    stats = FeatureStats(
        identity_of(net), data, num, pool.gaussian(),
        None if spatial is None else spatial.gaussian(), None if score is None else score.scores(),
    )  # fmt: skip
    if folder is not None:
        write_stats(folder / STATS_FILE, stats)  # last: it proves that the rows are whole
    return FeatureSet(stats, rows)


def spread(total: int, num: int | None, *, part: int = 0, parts: int = 1) -> NDArray[np.int64]:
    """Indices of `num` images spread evenly over `total`, so that a split sorted by class is still covered.

    With `parts` > 1: one of `parts` disjoint, interleaved sets of `num` images each. None: all images.

    Raises:
        DataError: more images asked for than there are.
    """
    if num is None:
        num = total // parts
    if not 0 < num * parts <= total:
        asked = f"{parts} x {num}" if parts > 1 else str(num)
        raise DataError(f"{asked} images are asked for; there are {total}.")
    positions = np.arange(num * parts, dtype=np.int64) * total // (num * parts)
    return positions[part::parts]


def read_feature_set(
    folder: Path, identity: FeatureIdentity, *, data: str, num: int, with_rows: bool = True
) -> FeatureSet | None:
    """What `gather` left in a folder; None where that is not all, damaged, or not of these images and this net."""
    try:
        stats = read_stats(folder / STATS_FILE, identity=identity, data=data)
        if not with_rows:
            return FeatureSet(stats, None) if stats.num == num else None
        rows = np.load(folder / ROWS_FILE, mmap_mode="r", allow_pickle=False)
    except (DataError, OSError, ValueError, EOFError):
        return None
    fits = rows.shape == (min(num, MAX_ROWS), stats.pool.dim) and rows.dtype == np.float32
    return FeatureSet(stats, rows) if fits else None


def in_blocks(parts: Iterator[Arrays], size: int = BLOCK) -> Iterator[Arrays]:
    """The rows of all parts in order, cut anew into blocks of `size`; the last may be smaller."""
    held: list[Arrays] = []
    num = 0
    for part in parts:
        held.append(part)
        num += len(part["pool"])
        if num >= size:
            joined = concatenated(iter(held))
            whole = num - num % size
            for start in range(0, whole, size):
                yield _rows_of(joined, slice(start, start + size))
            held, num = [_rows_of(joined, slice(whole, None))], num - whole
    if num:
        yield concatenated(iter(held))


def _rows_of(arrays: Arrays, rows: slice) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}


@contextmanager
def _rows_file(folder: Path | None) -> Iterator[IO[bytes]]:
    """A file to write rows to: a nameless one, or ROWS_FILE, which appears once it is complete."""
    if folder is None:
        with tempfile.TemporaryFile() as file:
            yield file
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{ROWS_FILE}.tmp-{platform.node()}-{os.getpid()}"  # hosts may share a folder
    try:
        with open(temporary, "w+b") as file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, folder / ROWS_FILE)
        fsync_file(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(file: IO[bytes], shape: tuple[int, int]) -> int:
    """Begin an npy file of float32; returns where its numbers start."""
    described: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.tell()
