"""One's own images, in a folder or a .tar or .zip of one: DIR/cat/1.jpg, DIR/cat_1.jpg, or unlabelled DIR/1.jpg."""

from __future__ import annotations

import argparse
import hashlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.index import NO_LABEL
from data_pipeline.sources import holdout
from data_pipeline.sources.archives import ARCHIVES, Members, Place, archive_places
from data_pipeline.sources.base import Collection, Source
from data_pipeline.sources.hash_order import hash_order
from data_pipeline.sources.names import printable
from data_pipeline.sources.originals import (
    EXTENSIONS,
    LooseFiles,
    Originals,
    OriginalsSplit,
    enlargement_remarks,
    is_dangling,
    is_image,
)
from data_pipeline.sources.sizing import Sizing

LABELLINGS = ("auto", "folder", "prefix", "none")


@dataclass(frozen=True)
class Pictures:
    """All images in a folder or archive, sorted by name."""

    path: Path
    flag: str  # which the user gave it with, for errors

    @property
    def _is_archive(self) -> bool:
        return self.path.suffix.lower() in ARCHIVES and not self.path.is_dir()

    @cached_property
    def originals(self) -> Originals:
        """The images, found and listed."""
        if self._is_archive:
            places = [place for place in archive_places(self.path) if is_image(place.name)]
            places = _without_enclosing_folders(places, self.path.stem)
            found: Originals = Members.of([self.path], ((0, place) for place in sorted(places)))
        elif self.path.is_dir():
            found = LooseFiles(self.path, list_images(self.path))
        else:
            kinds = " or ".join(ARCHIVES)
            raise DataError(f"{self.flag} {self.path}: there is no such folder, and it is no {kinds} either.")
        if not found.names:
            raise DataError(f"{self.flag} {self.path} holds no images (files ending in {', '.join(EXTENSIONS)}).")
        return found

    @property
    def files(self) -> Iterator[tuple[str, str]]:
        """Name and path of every file; of an archive, its own."""
        if self._is_archive and self.path.is_file():
            yield self.path.name, str(self.path)
        else:
            yield from ((name, f"{self.path}/{name}") for name in self.originals.names)

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of all names and sizes; of an archive, of its own name and size."""
        listing = hashlib.sha256()
        for name, path in self.files:
            listing.update(f"{name}\0{_size(path)}\n".encode("utf-8", "surrogateescape"))
        return listing.hexdigest()

    def classes(self, labelling: str) -> list[str] | None:
        """Every image's class, or None where they have none."""
        names = self.originals.names
        if labelling == "none":
            return None
        if labelling == "prefix":
            return [self._prefix(name) for name in names]
        flat = [name for name in names if "/" not in name]
        if len(flat) == len(names) and labelling == "auto":
            return None
        if flat:
            raise DataError(
                f"{self.flag} {self.path} mixes images in class folders with {len(flat)} images beside them "
                f"(such as {flat[0]}): either all of them lie in class folders, or --labels none (or prefix)."
            )
        return [name.partition("/")[0] for name in names]

    def _prefix(self, name: str) -> str:
        prefix, mark, _ = name.rpartition("/")[2].partition("_")
        if not mark:
            raise DataError(f'{self.flag} {self.path}: {name} has no "_", which --labels prefix needs after the class.')
        return prefix


def _size(path: str) -> int:
    """Bytes of a file; 0 of a link that leads nowhere."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        if is_dangling(path):
            return 0
        raise


def _without_enclosing_folders(places: list[Place], archive: str) -> list[Place]:
    """Without the folders that enclose all images: archives are often packed so.

    A single folder of images stays, as their class, unless it has the archive's own name (train_64x64.tar).
    """
    folders = {posixpath.dirname(place.name) for place in places}
    shared = posixpath.commonpath(folders) if folders else ""
    if len(folders) == 1 and posixpath.basename(shared) != archive:
        shared = posixpath.dirname(shared)
    start = len(shared) + 1 if shared else 0
    return [place._replace(name=place.name[start:]) for place in places]


def list_images(folder: Path) -> list[str]:
    """All images below a folder, relative to it, sorted; hidden files and folders are passed over.

    Links are followed. One that leads nowhere is listed too, if it is named as an image: reading it will fail.

    Raises:
        DataError: a folder cannot be read.
    """
    try:
        return sorted(_images_below(str(folder), "", frozenset()))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): its images would be missing.") from None


def _images_below(folder: str, within: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Images of a folder called `within`; `above` are the (device, inode) of the folders around it.

    A link back to one of these leads in a circle and is not followed.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, f"{within}{entry.name}/", above | {here})
            elif is_image(entry.name) and (entry.is_file() or is_dangling(entry)):  # no pipes, no devices
                yield within + entry.name
            elif "." not in entry.name and is_dangling(entry):
                raise DataError(f"{entry.path} is a link that leads nowhere and may be a class: mend or remove it.")


@dataclass(frozen=True)
class ImageFolder(Source):
    """Your own images: a folder, a .tar or a .zip of class folders, or flat."""

    train: Pictures
    test: Pictures | None
    sizing: Sizing
    labelling: str  # one of LABELLINGS
    holdout: float  # share of the images that goes to the test split; 0 where `test` is given
    kind = "folder"

    @property
    def name(self) -> str:
        path = self.train.path.resolve()
        return printable(path.stem if path.suffix.lower() in ARCHIVES else path.name)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--from", dest="origin", type=Path, metavar="DIR", required=True, help="the images: a folder, .tar or .zip"
        )
        parser.add_argument(
            "--labels", choices=LABELLINGS, default="auto",
            help='folder: the first folder\'s name is the class; prefix: the file name up to the first "_"; '
            "none: no classes, unlabelled; auto: folder if there are any, else none (default)",
        )  # fmt: skip
        holdout.add_arguments(parser, test="a folder, .tar or .zip of test images", metavar="DIR")
        Sizing.add_arguments(parser)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> ImageFolder:
        return cls(
            Pictures(args.origin, "--from"), None if args.test is None else Pictures(Path(args.test), "--test"),
            Sizing.from_arguments(args), args.labels, holdout.from_arguments(args),
        )  # fmt: skip

    def options(self) -> dict[str, str | int | float | bool]:
        options = {"listing_sha256": self.train.digest, **self.sizing.options(), "holdout": self.holdout}
        if self.test:
            options["test_listing_sha256"] = self.test.digest
        if self.labelling != "auto":
            options["labels"] = self.labelling
        return options

    def files(self) -> Iterator[str]:
        for pictures in (self.train, self.test):
            if pictures:
                yield from (path for _, path in pictures.files)

    def split_names(self) -> list[str]:
        return ["train", "test"] if self.test or self.holdout > 0 else ["train"]

    def open(self, workspace: Path) -> Collection:
        classes = self.train.classes(self.labelling)
        class_names = sorted(set(classes or []))
        labels = _numbers(classes, class_names, self.train)
        if self.test:
            test_labels = _numbers(self.test.classes(self.labelling), class_names, self.test)
            splits = {"train": self._split(self.train, labels), "test": self._split(self.test, test_labels)}
        else:
            names = self.train.originals.names
            is_test = holdout.held_out(names, self.holdout, origin=f"--from {self.train.path}")
            splits = {
                name: self._split(self.train, labels, np.flatnonzero(is_test == (name == "test")))
                for name in self.split_names()
            }
        return Collection(
            image_size=self.sizing.size, class_names=[printable(name) for name in class_names],
            preprocessing=self.sizing.stored_name, origin=f"folder {self.name}", splits=dict(splits),
            remarks=lambda: enlargement_remarks(splits, self.sizing.size),
        )  # fmt: skip

    def _split(
        self, pictures: Pictures, labels: NDArray[np.int64], rows: NDArray[np.int64] | None = None
    ) -> OriginalsSplit:
        rows = np.arange(len(labels)) if rows is None else rows
        if NO_LABEL not in labels:
            rows = rows[hash_order([pictures.originals.names[row] for row in rows.tolist()])]
        return OriginalsSplit(pictures.originals, rows, labels[rows], self.sizing)


def _numbers(classes: Sequence[str] | None, class_names: list[str], pictures: Pictures) -> NDArray[np.int64]:
    """Every image's label [n].

    Raises:
        DataError: one has a class that the training images do not have, or none where they have one.
    """
    if classes is None:
        if class_names:
            raise DataError(f"{pictures.flag} {pictures.path} has no class folders, the training images have them.")
        return np.full(len(pictures.originals.names), NO_LABEL, dtype=np.int64)
    unknown = sorted(set(classes) - set(class_names))
    if unknown:
        raise DataError(
            f"{pictures.flag} {pictures.path}: class {unknown[0]} does not occur among the training images "
            f"({len(unknown)} such). Class names must be the same in both."
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    return np.array([numbers[name] for name in classes], dtype=np.int64)
