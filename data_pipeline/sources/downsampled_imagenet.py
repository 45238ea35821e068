"""The official downsampled ImageNet (Chrabaszcz, Loshchilov & Hutter 2017): 8, 16, 32 or 64 pixels a side.

It comes as pickled batches or as npz files with the same arrays: `data` [n, 3 * S * S] of uint8, the red, green and
blue planes of each image, and `labels` [n], 1 to 1000. Pickles are read without executing them. The arrays are mapped,
not loaded: ten batches of 1.5 GB at 64 pixels cost no memory of their own, and forked processes share them.

The labels count classes in the order of the publishers' map_clsloc.txt (1 is n02119789, the kit fox), not of the sorted
WordNet ids that everybody else uses. They are kept, less one; a map_clsloc.txt beside the batches gives the names.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.progress import progress_bar, say
from data_pipeline.safe_pickle import map_pickle
from data_pipeline.sources.archives import ARCHIVES, zip_places
from data_pipeline.sources.base import Collection, Source, Split
from data_pipeline.zipped import mapped_array

NUM_CLASSES = 1000
NUM_BATCHES = 10
CLASS_MAP = "map_clsloc.txt"
_BATCH = re.compile(r"(?:train_data_batch_(\d+)|val_data)(?:\.npz)?")
_ARCHIVE = re.compile(r"imagenet\d+_.*", re.IGNORECASE)  # such as Imagenet64_train_part1.zip
_BLOCK = 1 << 20
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)  # the last: encrypted or rare


@dataclass(frozen=True)
class Batch:
    """One of the files."""

    data: NDArray[np.uint8]  # [n, 3 * S * S], mapped
    labels: NDArray[np.int64]  # [n], from 0

    @property
    def size(self) -> int:
        """S, pixels a side."""
        return isqrt(self.data.shape[1] // 3)


class BatchSplit:
    """The images of several batches, one batch after the other."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self._ends = np.cumsum([len(batch.labels) for batch in batches])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def load(self, position: int) -> tuple[NDArray[np.uint8], int]:
        number = int(np.searchsorted(self._ends, position, side="right"))
        batch = self.batches[number]
        row = position - int(self._ends[number]) + len(batch.labels)
        planes = batch.data[row].reshape(3, batch.size, batch.size)  # [C, S, S]
        return np.ascontiguousarray(planes.transpose(1, 2, 0)), int(batch.labels[row])


@dataclass(frozen=True)
class DownsampledImageNet(Source):
    """The official downsampled ImageNet: pickled batches or npz files; test/ from its validation images."""

    path: Path
    kind = "imagenet-downsampled"

    @property
    def name(self) -> str:
        return "imagenet-downsampled"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--from", dest="origin", type=Path, metavar="DIR", required=True,
            help="folder with train_data_batch_1 ... 10 and val_data (pickles or .npz), or with the archives of them "
            f"as published (Imagenet64_train_part1.zip ...); with {CLASS_MAP}, classes get their names",
        )  # fmt: skip

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> DownsampledImageNet:
        if not args.origin.is_dir():
            raise DataError(f"--from {args.origin}: there is no such folder.")
        return cls(args.origin)

    def options(self) -> dict[str, str | int | float | bool]:
        listing = "".join(f"{file.name}\0{file.stat().st_size}\n" for file in map(Path, self.files()))
        return {"files_sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()}

    def files(self) -> list[str]:
        return [str(file) for file in (*_batches(self.path), *_archives(self.path), *self.path.glob(CLASS_MAP))]

    def split_names(self) -> list[str]:
        return ["train", "test"]

    def open(self, workspace: Path) -> Collection:
        files = _by_split(self.path, workspace)
        batches = {name: [_read(file, workspace) for file in found] for name, found in files.items()}
        sizes = {batch.size for group in batches.values() for batch in group}
        if len(sizes) > 1:
            raise DataError(f"--from {self.path} mixes sizes ({sorted(sizes)} pixels): keep one set in a folder.")
        splits: dict[str, Split] = {name: BatchSplit(group) for name, group in batches.items()}
        return Collection(
            image_size=sizes.pop(), class_names=_class_names(self.path), preprocessing="official-downsampled",
            origin="the official downsampled ImageNet; test/ is its validation set", splits=splits,
        )  # fmt: skip


def _batches(folder: Path) -> list[Path]:
    """The batches in a folder and its sub-folders, by name."""
    found = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if _BATCH.fullmatch(path.name)]
    return sorted(path for path in found if path.is_file())


def _archives(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.suffix.lower() in ARCHIVES and _ARCHIVE.fullmatch(path.name)]
    return sorted(found)


def _by_split(folder: Path, workspace: Path) -> dict[str, list[Path]]:
    """The batches of each split in their order; those that are still in archives come from there.

    Raises:
        DataError: there are none of a split, or one is there twice.
    """
    files = _batches(folder)
    for archive in _archives(folder):
        files += _unpacked(archive, workspace)
    by_number: dict[int, Path] = {}  # 0: validation
    for path in files:
        match = _BATCH.fullmatch(path.name)
        number = int(match[1] or 0) if match else 0
        if number in by_number:
            raise DataError(
                f"--from {folder} holds {path.name} twice ({by_number[number].name} too; packed or unpacked, or of two "
                "sizes): keep one set, in one packing, in a folder."
            )
        by_number[number] = path
    train = [by_number[number] for number in sorted(by_number) if number]
    if not train or 0 not in by_number:
        missing = "train_data_batch_1 ..." if not train else "val_data"
        raise DataError(
            f"--from {folder} holds no {missing} (pickled or .npz), packed or not. Get both the training and the "
            "validation images of one size from image-net.org and put them into one folder."
        )
    if len(train) != NUM_BATCHES:
        say(f"warning: {len(train)} training batches, the whole set has {NUM_BATCHES}")
    return {"train": train, "test": [by_number[0]]}


def _unpacked(archive: Path, workspace: Path) -> Iterator[Path]:
    """Unpack the batches inside an archive into the workspace."""
    place = workspace / archive.stem
    place.mkdir(exist_ok=True)
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    if _BATCH.fullmatch(name := info.filename.rpartition("/")[2]):
                        yield _copied(opened.open(info), place / name, info.file_size)
        else:
            with tarfile.open(archive, "r:") as tar:
                for entry in tar:
                    content = tar.extractfile(entry)
                    if content and _BATCH.fullmatch(name := entry.name.rpartition("/")[2]):
                        yield _copied(content, place / name, entry.size)
    except _DAMAGED as error:
        raise DataError(f"{archive} is damaged ({error}): get it again.") from None


def _copied(content: IO[bytes], path: Path, num_bytes: int) -> Path:
    with content, open(path, "wb") as file, progress_bar(
        total=num_bytes, unit="B", scale=True, description=f"unpack {path.name}"
    ) as bar:  # fmt: skip
        while block := content.read(_BLOCK):
            file.write(block)
            bar.update(len(block))
    return path


def _read(path: Path, workspace: Path) -> Batch:
    """A batch, its `data` mapped.

    Raises:
        DataError: it is damaged or of another layout.
    """
    content = _npz(path, workspace) if path.suffix == ".npz" else map_pickle(path)
    if not {"data", "labels"} <= content.keys():
        raise DataError(f"{path} has no `data` and `labels`: it is no batch of the downsampled ImageNet.")
    data, labels = np.asarray(content["data"]), np.asarray(content["labels"])
    if not _is_batch(data, labels):
        raise DataError(
            f"{path}: expected data of uint8 [n, 3 * S * S] and n labels, whole numbers, with n and S at least 1; "
            f"found {data.dtype} {list(data.shape)} and {list(labels.shape)} labels of {labels.dtype}."
        )
    if labels.min() < 1 or labels.max() > NUM_CLASSES:
        raise DataError(f"{path}: labels run from {labels.min()} to {labels.max()}, expected 1 to {NUM_CLASSES}.")
    return Batch(data, labels.astype(np.int64) - 1)


def _is_batch(data: NDArray[Any], labels: NDArray[Any]) -> bool:
    if data.dtype != np.uint8 or data.ndim != 2 or 0 in data.shape:
        return False
    size = isqrt(data.shape[1] // 3)
    return (
        data.shape[1] == 3 * size * size and labels.shape == data.shape[:1] and np.issubdtype(labels.dtype, np.integer)
    )


def _npz(path: Path, workspace: Path) -> dict[str, NDArray[Any]]:
    """`data` and `labels` of an npz file: mapped where they lie, or, compressed, from a copy in the workspace."""
    arrays = {}
    for place in zip_places(path):
        name = place.name.removesuffix(".npy")
        if name not in ("data", "labels"):
            continue
        if place.deflated:
            copy = _inflated(path, place.name, workspace)
            arrays[name] = _mapped(copy, 0, copy.stat().st_size)
        else:
            arrays[name] = _mapped(path, place.offset, place.size)
    return arrays


def _inflated(path: Path, member: str, workspace: Path) -> Path:
    """A copy of a compressed member of an npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(member).file_size
            return _copied(archive.open(member), workspace / f"{path.stem}-{member}", size)
    except (*_DAMAGED, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): get it again.") from None


def _mapped(path: Path, offset: int, num_bytes: int) -> NDArray[Any]:
    """The array of a NumPy file that lies in `num_bytes` bytes of `path` from `offset` on, mapped read-only."""
    try:
        return mapped_array(path, offset, num_bytes)
    except (ValueError, TypeError, OverflowError, OSError) as error:
        raise DataError(f"{path} is damaged or holds no plain arrays ({error}): get it again.") from None


def _class_names(folder: Path) -> list[str]:
    """Names in the publishers' order.

    Raises:
        DataError: the class map is there, but is not one.
    """
    path = folder / CLASS_MAP
    if not path.is_file():
        return [f"{CLASS_MAP} {number}" for number in range(1, NUM_CLASSES + 1)]
    rows = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if [row[1:2] for row in rows] != [[str(number)] for number in range(1, NUM_CLASSES + 1)]:
        raise DataError(f"{path}: expected {NUM_CLASSES:,} lines such as 'n02119789 1 kit_fox', numbered in order.")
    return [" ".join((row[0], *row[2:])).replace("_", " ") for row in rows]
