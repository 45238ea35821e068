"""A set of images at a path, whatever it is: an npz of images, a folder of shards, a folder of image files.

Images are read one after the other and are never all in memory. Those of a folder may differ in size: each is given as
it is, since feature nets resize.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import manifest
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.index import NO_LABEL
from data_pipeline.resize import to_rgb
from data_pipeline.sources.originals import EXTENSIONS

BATCH = 256  # images that a feature net is given at once
IMAGES = "arr_0"  # the array of images in an npz (ADM's name, and numpy's for one without a name)
_BAD_ARCHIVE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class ImageSet(Protocol):
    """Images by number, 0 .. len - 1."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels; takes a pass over all images where it is not stored."""
        ...

    def read(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        """The images [H, W, 3] of these numbers, which ascend. Raises DataError for a damaged one."""
        ...


def open_images(path: Path) -> ImageSet:
    """The set of images at a path.

    Raises:
        DataError: nothing is there, or nothing that is a set of images; says what would be.
    """
    if path.is_dir():
        if (path / manifest.FILE_NAME).exists():
            return ShardImages(path)
        splits = sorted(found.parent.name for found in path.glob(f"*/{manifest.FILE_NAME}"))
        if splits:
            raise DataError(f"{path} holds the data splits {', '.join(splits)}: name one, such as {path / splits[0]}.")
        return FolderImages(path)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}.")
    return NpzImages(path)


def batches(images: ImageSet, rows: NDArray[np.int64], size: int = BATCH) -> Iterator[torch.Tensor]:
    """uint8 tensors [n, 3, H, W] of up to `size` images that follow each other and are of one size in pixels."""
    held: list[NDArray[np.uint8]] = []
    for image in images.read(rows):
        if held and (len(held) == size or held[0].shape != image.shape):
            yield _stacked(held)
            held = []
        held.append(image)
    if held:
        yield _stacked(held)


def _stacked(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _digest(images: ImageSet) -> str:
    rows = np.arange(len(images))
    return fingerprint(sample_digest(image, NO_LABEL) for image in images.read(rows))


class NpzImages:
    """`arr_0`, uint8 [N, H, W, 3], of an npz; read through its archive as it comes, compressed or not.

    Raises:
        DataError: not a readable npz, no such array, or one of another type or shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as (_, shape, dtype):
            pass
        what = f"{path}: {IMAGES} is {dtype} {list(shape)}; images are uint8 [N, H, W, 3]"
        if dtype.kind == "f":
            raise DataError(f"{what}. Scale floats to 0..255, round and convert them first.")
        if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
            raise DataError(f"{what}. Repeat the channel of grey images three times.")
        if len(shape) == 4 and shape[3] == 4:
            raise DataError(f"{what}. Lay transparent images over a background and drop the alpha channel first.")
        if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
            raise DataError(f"{what}. Move the channels to the end.")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise DataError(f"{what}.")
        if 0 in shape:
            raise DataError(f"{path} holds no images: {IMAGES} is {list(shape)}.")
        self._num, self._shape = shape[0], shape[1:]

    def __len__(self) -> int:
        return self._num

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self)

    def read(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        size = int(np.prod(self._shape))
        with self._opened() as (file, _, _):
            position = 0
            for row in rows.tolist():
                file.seek((row - position) * size, os.SEEK_CUR)
                position = row + 1
                content = file.read(size)
                if len(content) != size:
                    raise DataError(f"{self.path} is damaged: {IMAGES} ends at image {row} of {self._num}.")
                yield np.frombuffer(content, np.uint8).reshape(self._shape)

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[np.generic]]]:
        """The array's stream after its header, its shape and its type."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                if f"{IMAGES}.npy" not in archive.namelist():
                    names = ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())) or "nothing"
                    raise DataError(
                        f"{self.path} holds neither images ({IMAGES}) nor feature statistics (mu, sigma), but {names}."
                    )
                with archive.open(f"{IMAGES}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read_header = {
                        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
                    }[version]  # fmt: skip
                    shape, fortran_order, dtype = read_header(file)
                    if fortran_order and len(shape) > 1:
                        raise DataError(f"{self.path}: {IMAGES} is in Fortran order; save np.ascontiguousarray of it.")
                    yield file, shape, dtype
        except (KeyError, *_BAD_ARCHIVE) as error:
            raise DataError(f"{self.path} is not a readable npz file ({error}).") from error


class ShardImages:
    """A prepared data split, or samples that were written as one. Raises DataError for an incomplete one."""

    def __init__(self, folder: Path) -> None:
        self._dataset = ShardDataset(folder)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def fingerprint(self) -> str:
        return self._dataset.manifest.fingerprint

    def read(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(rows), BATCH):
            images, _ = self._dataset.read(rows[start : start + BATCH])
            yield from images.transpose(0, 2, 3, 1)


class FolderImages:
    """All image files below a folder, in the order of their paths, made RGB as data preparation does.

    Grey is repeated, transparency laid over white, EXIF rotation applied. Raises DataError where there are none.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(
            Path(parent) / name
            for parent, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        )
        if not self.files:
            raise DataError(
                f"{folder} holds no images (files ending in {', '.join(EXTENSIONS)}) and no {manifest.FILE_NAME} of "
                "shards."
            )

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self)

    def read(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for row in rows.tolist():
            try:
                with Image.open(self.files[row]) as image:
                    pixels = np.asarray(to_rgb(image))
            except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
                raise DataError(f"{self.files[row]} cannot be read as an image ({error}): mend or remove it.") from None
            yield pixels


def holds_images(path: Path) -> bool:
    """Whether an npz has an array of images."""
    return f"{IMAGES}.npy" in _members(path)


def holds_statistics(path: Path) -> bool:
    """Whether a path is an npz of feature statistics (which may bring images as well)."""
    return path.is_file() and "mu.npy" in _members(path)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path} is not a readable npz file ({error}).") from error
