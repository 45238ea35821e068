"""A folder of one's own images: one sub-folder a class (DIR/cat/1.jpg), or flat and unlabelled (DIR/1.jpg)."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.index import NO_LABEL
from data_pipeline.resize import CENTRE_CROP, centre_crop, to_rgb
from data_pipeline.sources.base import Collection, Source, Split, UnreadableImageError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FolderSplit:
    """Some of the folder's images."""

    root: Path
    files: list[str]  # relative to root
    labels: list[int]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def load(self, position: int) -> tuple[NDArray[np.uint8], int]:
        try:
            with Image.open(self.root / self.files[position]) as image:
                return centre_crop(to_rgb(image), self.size), self.labels[position]
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{self.files[position]}: {error}") from None


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder of your own images: class folders, or flat without labels."""

    path: Path
    size: int
    holdout: float  # share of the images that goes to the test split
    kind = "folder"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--from", dest="origin", type=Path, metavar="DIR", required=True, help="the images")
        parser.add_argument("--size", type=int, required=True, help="pixels a side of the prepared images")
        parser.add_argument("--holdout", type=float, default=0.1, help="share held out as test/ (default 0.1)")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> ImageFolder:
        if args.size < 1:
            raise DataError(f"--size is {args.size}; it must be at least 1.")
        if not 0 <= args.holdout < 1:
            raise DataError(f"--holdout is {args.holdout}; it must be at least 0 and below 1.")
        return cls(args.origin, args.size, args.holdout)

    def options(self) -> dict[str, str | int | float | bool]:
        listing = hashlib.sha256()
        for name in self._files:
            listing.update(f"{name}\0{(self.path / name).stat().st_size}\n".encode("utf-8", "surrogateescape"))
        return {"listing_sha256": listing.hexdigest(), "size": self.size, "holdout": self.holdout}

    def split_names(self) -> list[str]:
        return ["train", "test"] if self.holdout > 0 else ["train"]

    def open(self, workspace: Path) -> Collection:
        class_names, labels = self._labelled()
        held_out = self._held_out()
        splits: dict[str, Split] = {}
        for name in self.split_names():
            rows = [row for row in range(len(self._files)) if (row in held_out) == (name == "test")]
            splits[name] = FolderSplit(
                self.path, [self._files[row] for row in rows], [labels[row] for row in rows], self.size
            )
        return Collection(
            image_size=self.size, class_names=class_names, preprocessing=CENTRE_CROP,
            origin=f"folder {self.name}", splits=splits,
        )  # fmt: skip

    @cached_property
    def _files(self) -> list[str]:
        """All images below the folder, relative to it, sorted."""
        if not self.path.is_dir():
            raise DataError(f"--from {self.path}: there is no such folder.")
        found = []
        for parent, folders, names in os.walk(self.path):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            within = Path(parent).relative_to(self.path)
            found += [
                (within / name).as_posix()
                for name in names
                if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
            ]
        if not found:
            raise DataError(f"--from {self.path} holds no images (files ending in {', '.join(EXTENSIONS)}).")
        return sorted(found)

    def _labelled(self) -> tuple[list[str], list[int]]:
        """The class names and every file's label."""
        flat = [name for name in self._files if "/" not in name]
        if len(flat) == len(self._files):
            return [], [NO_LABEL] * len(flat)
        if flat:
            raise DataError(
                f"--from {self.path} mixes images in class folders with {len(flat)} images beside them "
                f"(such as {flat[0]}): either all of them lie in class folders, or none."
            )
        folders = [name.partition("/")[0] for name in self._files]
        class_names = sorted(set(folders))
        numbers = {name: number for number, name in enumerate(class_names)}
        return class_names, [numbers[folder] for folder in folders]

    def _held_out(self) -> set[int]:
        """The images of the test split: chosen by a hash of their names, so that it does not change with the others."""
        num_test = round(self.holdout * len(self._files))
        if self.holdout > 0:
            num_test = max(num_test, 1)
        if num_test >= len(self._files):
            raise DataError(
                f"--from {self.path} holds only {len(self._files)} images: too few to hold out {self.holdout:g} of all."
            )
        hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in self._files]
        return set(sorted(range(len(self._files)), key=hashes.__getitem__)[:num_test])
