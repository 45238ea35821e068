"""Images inside tar and zip archives, read where they lie: nothing is unpacked."""

from __future__ import annotations

import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_pipeline import tar
from data_pipeline.errors import DataError
from data_pipeline.progress import progress_bar
from data_pipeline.zipped import content_offset

ARCHIVES = (".tar", ".zip")
_MAX_INFLATED = 1 << 28  # bytes: an 8-bit RGB image at Pillow's limit of pixels


class Place(NamedTuple):
    """Where a member of an archive lies."""

    name: str
    offset: int  # bytes, of its content in the archive's file
    size: int  # bytes, as stored
    deflated: bool = False


@dataclass(frozen=True)
class Members:
    """Members of one or several archives, in a fixed order; columns rather than objects: there may be millions."""

    paths: list[Path]
    names: list[str]
    file: NDArray[np.int32]  # [n]: which of the paths
    offset: NDArray[np.int64]  # [n]
    size: NDArray[np.int64]  # [n]
    deflated: NDArray[np.bool_]  # [n]

    @classmethod
    def of(cls, paths: list[Path], places: Iterable[tuple[int, Place]]) -> Members:
        """From (number of the path, place) pairs."""
        rows = list(places)
        return cls(
            paths, [place.name for _, place in rows],
            file=np.array([number for number, _ in rows], dtype=np.int32),
            offset=np.array([place.offset for _, place in rows], dtype=np.int64),
            size=np.array([place.size for _, place in rows], dtype=np.int64),
            deflated=np.array([place.deflated for _, place in rows], dtype=np.bool_),
        )  # fmt: skip

    def read(self, position: int) -> bytes:
        size = int(self.size[position])
        with open(self.paths[int(self.file[position])], "rb", buffering=0) as file:
            file.seek(int(self.offset[position]))
            content = file.read(size) or b""
        if len(content) != size:
            raise OSError(f"the archive ends before it: {len(content):,} of {size:,} bytes")
        return _inflated(content) if self.deflated[position] else content


def _inflated(content: bytes) -> bytes:
    """Raises a zlib.error where the end is missing, or lies beyond what one image may have."""
    inflating = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    inflated = inflating.decompress(content, _MAX_INFLATED)
    if not inflating.eof:
        raise zlib.error(f"it is cut short, or inflates to more than {_MAX_INFLATED:,} bytes")
    return inflated


def _relative(name: str) -> str:
    """A member's name from the archive's root on; neither `/` nor `..` leads out of it."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def archive_places(path: Path) -> Iterator[Place]:
    """The files inside a .tar or .zip, in the archive's order, under a bar.

    Raises:
        DataError: it is not there, damaged, cut short, compressed as a whole, or encrypted.
    """
    if not path.is_file():
        raise DataError(f"there is no archive {path}.")
    if path.suffix.lower() == ".zip":
        yield from zip_places(path)
        return
    with scanned(path) as (file, bar):
        yield from tar_places(file, path.name, 0, path.stat().st_size, bar)


@contextmanager
def scanned(path: Path) -> Iterator[tuple[RawIOBase, tqdm[Any]]]:
    """An archive opened for hopping from header to header, and a bar over its bytes."""
    with open(path, "rb", buffering=0) as file, progress_bar(
        total=path.stat().st_size, unit="B", scale=True, description=f"scan {path.name}"
    ) as bar:  # fmt: skip
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # what lies between two headers is not wanted yet
        yield file, bar


def tar_places(file: RawIOBase, name: str, start: int, end: int, bar: tqdm[Any] | None = None) -> Iterator[Place]:
    """The files of the tar archive at bytes start .. end of an open file: one small read and one seek a member.

    `name` is the archive's, for errors; `bar` counts the bytes that were passed.

    Raises:
        DataError: it is no plain tar, damaged, or cut short.
    """
    passed = start
    try:
        for entry in tar.walk(file, start, end):
            if bar is not None:
                bar.update(max(0, entry.offset + entry.size - passed))  # a hard link's content lies further back
                passed = max(passed, entry.offset + entry.size)
            yield Place(_relative(entry.name), entry.offset, entry.size)
    except tar.CutTarError as error:
        raise DataError(f"{name} is cut short or damaged: {error}. Get it again, and compare its size.") from None
    except tar.DamagedTarError as error:
        raise DataError(
            f"{name} is no plain tar archive, or damaged ({error}). Unpack one that is compressed as a whole (.tar.gz) "
            "with gunzip; else get it again."
        ) from None
    if bar is not None:
        bar.update(end - passed)


def zip_places(path: Path) -> Iterator[Place]:
    """The files inside a zip archive, under a bar.

    Raises:
        DataError: it is damaged, or a member is encrypted or compressed in a rare way.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = archive.infolist()
            for entry in progress_bar(entries, total=len(entries), unit="file", description=f"scan {path.name}"):
                if entry.is_dir():
                    continue
                if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(f"{path}: {entry.filename} is encrypted or compressed in a rare way: unpack it.")
                deflated = entry.compress_type == zipfile.ZIP_DEFLATED
                yield Place(_relative(entry.filename), content_offset(file, entry), entry.compress_size, deflated)
    except (zipfile.BadZipFile, struct.error) as error:
        raise DataError(f"{path} is damaged or no zip archive ({error}): get it again.") from None
