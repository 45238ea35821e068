"""Originals: encoded images of any size that lie in files or inside archives, and how one becomes a sample.

Reading opens the file anew for every image: that costs microseconds beside milliseconds of decoding, and processes
forked from one another share no file position.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import codec
from data_pipeline.errors import DataError
from data_pipeline.resize import to_rgb
from data_pipeline.sources.base import UnreadableImageError
from data_pipeline.sources.names import printable
from data_pipeline.sources.sizing import Sizing

EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp",
)  # fmt: skip
# What those files may hold, whatever their names say. Not EPS, for which Pillow would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "MPO")
_NPY = b"\x93NUMPY"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"  # marks that the data of a scan never look like
_ZERO_TAIL = 64  # bytes
_MORE_DATA = b"\x5a\xa5" * 64
_FILLING = (128, (128, 128, 128))  # a pixel that no data came for
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name; hidden files and what lies in hidden folders are not."""
    return name.lower().endswith(EXTENSIONS) and not any(part.startswith(".") for part in name.split("/"))


def is_dangling(path: os.PathLike[str] | str) -> bool:
    """Whether a file is a link to one that is not there."""
    return os.path.islink(path) and not os.path.exists(path)


class Originals(Protocol):
    """Encoded images in a fixed order."""

    @property
    def names(self) -> Sequence[str]:
        """What errors and listings call them; no machine's paths."""
        ...

    def read(self, position: int) -> bytes:
        """The bytes of number `position`."""
        ...


@dataclass(frozen=True)
class LooseFiles:
    """Files below a folder."""

    root: Path
    names: list[str]  # relative to root

    def read(self, position: int) -> bytes:
        path = self.root / self.names[position]
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if is_dangling(path):
                raise ValueError("it is a link that leads nowhere") from None
            raise


class Counter:
    """A number that processes forked from this one count up together."""

    def __init__(self) -> None:
        self._value = multiprocessing.get_context("fork").Value("q", 0)

    def add_one(self) -> None:
        with self._value.get_lock():
            self._value.value += 1

    @property
    def total(self) -> int:
        return int(self._value.value)


@dataclass(frozen=True)
class OriginalsSplit:
    """A split made from some of the originals."""

    originals: Originals
    rows: NDArray[np.int64]  # [n]: which of them, in the order of the split
    labels: NDArray[np.int64]  # [n]
    sizing: Sizing
    upright: bool = True  # apply EXIF rotation
    enlarged: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, position: int) -> tuple[NDArray[np.uint8], int]:
        row = int(self.rows[position])
        try:
            image = open_original(self.originals.read(row), upright=self.upright)
            pixels = self.sizing(image)
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the decoder's
                raise DataError(
                    f"{printable(self.originals.names[row])} cannot be read: {error.strerror}. That is no damaged "
                    "image: see to the disk or its permissions, and run the same command again."
                ) from None
            raise UnreadableImageError(f"{printable(self.originals.names[row])}: {error}") from None
        if self.sizing.enlarges(image):
            self.enlarged.add_one()
        return pixels, int(self.labels[position])


def enlargement_remarks(splits: dict[str, OriginalsSplit], size: int) -> list[str]:
    """What to tell of originals that were smaller than the images made of them."""
    return [
        f"{name}: {split.enlarged.total:,} of the originals that were read are smaller than {size} pixels: enlarged"
        for name, split in splits.items()
        if split.enlarged.total
    ]


def open_original(payload: bytes, *, upright: bool = True) -> Image.Image:
    """The bytes of an image file (or of a NumPy array of uint8) as an RGB image.

    Raises:
        OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, zlib.error, DecompressionBombError: they
            are damaged, truncated, of no known format, or more than Pillow's limit of 179 million pixels.
    """
    if not payload:
        raise ValueError("the file is empty")
    if payload.startswith(_NPY):
        return Image.fromarray(codec.decode(payload, "npy"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of junk in EXIF blocks, and of large pictures below the limit
        try:
            with Image.open(io.BytesIO(payload), formats=_formats()) as image:
                rgb = to_rgb(image, upright=upright)
                _check_jpeg_end(image, payload)
                return rgb
        except Image.UnidentifiedImageError:
            raise ValueError(f"no image file of a known kind ({len(payload):,} bytes)") from None


def _check_jpeg_end(image: Image.Image, payload: bytes) -> None:
    """Refuse a JPEG whose lower part is made up: libjpeg says nothing of it where a cut file was closed again.

    That is, where zeros fill it up to its old length, or an end mark follows the cut. (Of a progressive one, which
    draws the whole picture in growing detail, the latter is seen only in its first round.)
    """
    if image.format not in ("JPEG", "MPO"):
        return
    end = payload.rfind(_JPEG_END)
    if end < payload.rfind(_JPEG_SCAN) and not any(payload[-_ZERO_TAIL:]):
        raise ValueError("the file breaks off: its last part is zeros")
    if image.getpixel((image.width - 1, image.height - 1)) not in _FILLING:
        return
    # More data before the end mark is passed over where the picture is complete, and drawn where it was cut.
    try:
        with Image.open(io.BytesIO(payload[:end] + _MORE_DATA + payload[end:]), formats=["JPEG"]) as again:
            complete = again.tobytes() == image.tobytes()
    except OSError:
        complete = False
    if not complete:
        raise ValueError("the file was cut and closed again: its lower part is missing")


@lru_cache
def _formats() -> list[str]:
    """Those of the known formats that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
