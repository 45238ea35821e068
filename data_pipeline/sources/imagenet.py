"""ImageNet (ILSVRC2012, Russakovsky et al. 2015) from its official archives, read where they lie, or from folders.

A class's number is the rank of its WordNet id among the sorted 1,000, as everywhere in the field. The order hangs on
the photos' names alone (training: classes mixed, see hash_order.py; validation: by name), so archives and folders give
the same data set. EXIF rotation is not applied: it never was in published work on ImageNet, and its reference
statistics are of the photos as stored.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.progress import say
from data_pipeline.sources.archives import Members, Place, archive_places, scanned, tar_places
from data_pipeline.sources.base import Collection, Source
from data_pipeline.sources.hash_order import hash_order
from data_pipeline.sources.image_folder import list_images
from data_pipeline.sources.imagenet_labels import WNID, ValidationLabels, read_labels
from data_pipeline.sources.names import printable
from data_pipeline.sources.originals import LooseFiles, Originals, OriginalsSplit, enlargement_remarks, is_image
from data_pipeline.sources.sizing import Sizing

NUM_CLASSES = 1000
NUM_PHOTOS = {"train": 1_281_167, "test": 50_000}
TRAIN_PLACES = ("ILSVRC2012_img_train.tar", "train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train")
VAL_PLACES = ("ILSVRC2012_img_val.tar", "val", "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val")
LABEL_PLACES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv")

Photos = tuple[Originals, list[str]]  # sorted by name; the WordNet id of each


@dataclass(frozen=True)
class ImageNet(Source):
    """ImageNet (ILSVRC2012): train/ from the training photos, test/ from the validation photos."""

    train: Path  # the tar of tars, a folder of class tars, or class folders
    val: Path  # the tar, a flat folder, or class folders
    devkit: Path | None  # where the validation labels are; None where `val` has class folders
    sizing: Sizing
    kind = "imagenet"

    @property
    def name(self) -> str:
        return "imagenet"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--from", dest="origin", type=Path, metavar="DIR",
            help=f"folder with {TRAIN_PLACES[0]} (or train/), {VAL_PLACES[0]} (or val/) and {LABEL_PLACES[0]}",
        )  # fmt: skip
        parser.add_argument(
            "--train", type=Path, metavar="PATH", help="training photos: the tar of class tars, or class folders"
        )
        parser.add_argument(
            "--val", type=Path, metavar="PATH", help="validation photos (they become test/): the tar, or a folder"
        )
        parser.add_argument(
            "--devkit", type=Path, metavar="PATH",
            help="validation labels: the development kit, its folder, or a .txt or .csv file of file names and "
            "WordNet ids; not needed where the validation photos lie in class folders",
        )  # fmt: skip
        Sizing.add_arguments(parser)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> ImageNet:
        return cls(
            _wanted("--train", args.train, args.origin, TRAIN_PLACES),
            _wanted("--val", args.val, args.origin, VAL_PLACES),
            args.devkit or _found(args.origin, LABEL_PLACES),
            Sizing.from_arguments(args),
        )

    def options(self) -> dict[str, str | int | float | bool]:
        return {**self._identities, **self.sizing.options()}

    @cached_property
    def _identities(self) -> dict[str, str]:
        return {name: _identity(path, self._listed[path]) for name, path in self._paths.items()}

    @property
    def _paths(self) -> dict[str, Path]:
        paths = {"train": self.train, "val": self.val, "devkit": self.devkit}
        return {name: path for name, path in paths.items() if path}

    @cached_property
    def _listed(self) -> dict[Path, list[str]]:
        """What lies in the folders among the paths; a million names take a while."""
        return {path: _listing(path) for path in self._paths.values()}

    def files(self) -> Iterator[str]:
        for path in self._paths.values():
            yield from (f"{path}/{name}" for name in self._listed[path]) if path.is_dir() else [str(path)]

    def split_names(self) -> list[str]:
        return ["train", "test"]

    def open(self, workspace: Path) -> Collection:
        kit = read_labels(self.devkit) if self.devkit else None
        photos = {
            "train": _train_photos(self.train, self._listed[self.train]),
            "test": _val_photos(self.val, self._listed[self.val], kit),
        }
        self._check_classes(photos)
        words = kit.words if kit else {}
        wnids = sorted(set(words).union(*(classes for _, classes in photos.values())))
        _warn_of_missing(wnids, photos)
        numbers = {wnid: number for number, wnid in enumerate(wnids)}
        splits = {}
        for name, (originals, classes) in photos.items():
            in_order = np.arange(len(classes)) if name == "test" else hash_order(map(_file_name, originals.names))
            labels = np.array([numbers[wnid] for wnid in classes], dtype=np.int64)
            splits[name] = OriginalsSplit(originals, in_order, labels[in_order], self.sizing, upright=False)
        return Collection(
            image_size=self.sizing.size,
            class_names=[f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids],
            preprocessing=self.sizing.stored_name,
            origin=printable(f"{self.train.name}; test/ is the validation set, {self.val.name}"),
            splits=dict(splits),
            remarks=lambda: enlargement_remarks(splits, self.sizing.size),
        )

    def _check_classes(self, photos: dict[str, Photos]) -> None:
        """Refuse labels of another set: they would add classes of their own."""
        unknown = sorted(set(photos["test"][1]) - set(photos["train"][1]))
        if unknown:
            labels = f" with --devkit {self.devkit}" if self.devkit else ""
            raise DataError(
                f"--val {self.val}{labels}: class {unknown[0]} does not occur among the training photos, "
                f"{self.train} ({len(unknown)} such). Photos and labels must be of one set of classes."
            )


def _found(folder: Path | None, places: tuple[str, ...]) -> Path | None:
    return next((folder / place for place in places if (folder / place).exists()), None) if folder else None


def _wanted(flag: str, given: Path | None, folder: Path | None, places: tuple[str, ...]) -> Path:
    path = given or _found(folder, places)
    if path is None:
        where = f"--from {folder} holds none of {', '.join(places)}" if folder else "there is no --from DIR"
        raise DataError(f"{flag} is not given and {where}. Say where these photos are with {flag} PATH.")
    if not path.exists():
        raise DataError(f"{flag} {path}: there is no such file or folder.")
    return path


def _listing(path: Path) -> list[str]:
    """The class archives in a folder, or the images below it, or else all files; by name. Of a file, nothing."""
    if path.is_file():
        return []
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return _class_tars(path) or list_images(path) or sorted(files)


def _identity(path: Path, names: list[str]) -> str:
    """What a path holds, without its place: an archive's name and size, or a digest of the `names` below a folder."""
    if path.is_file():
        return f"{printable(path.name)}, {path.stat().st_size} bytes"
    return "files " + hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def _warn_of_missing(wnids: list[str], photos: dict[str, Photos]) -> None:
    for name, (_, classes) in photos.items():
        found = len(classes), len(set(classes))
        if found != (NUM_PHOTOS[name], NUM_CLASSES):
            say(
                f"warning: {name} has {found[0]:,} photos of {found[1]:,} classes, ImageNet has "
                f"{NUM_PHOTOS[name]:,} of {NUM_CLASSES:,}"
            )
    if len(wnids) != NUM_CLASSES:
        say(f"warning: classes are numbered 0 to {len(wnids) - 1} among those found, not as in all of ImageNet")


def _train_photos(path: Path, listed: list[str]) -> Photos:
    """The training photos: a tar of class tars, or a folder that holds the `listed` class tars or photos.

    Raises:
        DataError: it is none of these.
    """
    if path.is_file():
        return _members([path], ((0, wnid, place) for wnid, place in _nested(path)), f"--train {path}")
    tars = _class_tars(path)
    if tars:
        found = (
            (number, name.removesuffix(".tar"), place)
            for number, name in enumerate(tars)
            for place in archive_places(path / name)
        )
        return _members([path / name for name in tars], found, f"--train {path}")
    return _class_folders(path, listed, "--train")


def _class_tars(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("n*.tar") if WNID.fullmatch(file.stem))


def _nested(path: Path) -> Iterator[tuple[str, Place]]:
    """(WordNet id, place) of the photos in a tar of class tars; places count from the start of the outer one."""
    with scanned(path) as (file, bar):
        inner = list(tar_places(file, path.name, 0, path.stat().st_size))
        for place in inner:
            wnid, _, ending = _file_name(place.name).partition(".")
            if not WNID.fullmatch(wnid) or ending != "tar":
                raise DataError(
                    f"--train {path} holds {place.name}, expected class archives such as n01440764.tar. "
                    "If it is a plain archive of images, unpack it, or use prepare folder --from."
                )
            inside = tar_places(file, f"{path.name}: {place.name}", place.offset, place.offset + place.size, bar)
            yield from ((wnid, photo) for photo in inside)


def _val_photos(path: Path, listed: list[str], labels: ValidationLabels | None) -> Photos:
    """The validation photos: a tar or a folder, of class folders or flat with `labels`.

    Raises:
        DataError: they are flat and there are no labels for them.
    """
    if path.is_file():
        places = [place for place in archive_places(path) if is_image(place.name)]
        return _members([path], ((0, _val_class(place.name, labels, path), place) for place in places), f"--val {path}")
    names = [name for name in listed if is_image(name)]
    if any("/" in name for name in names):
        return _class_folders(path, names, "--val")
    classes = [_val_class(name, labels, path) for name in names]
    return _sorted_files(path, names, classes, "--val")


def _val_class(name: str, labels: ValidationLabels | None, path: Path) -> str:
    folder = name.rpartition("/")[0].rpartition("/")[2]
    if WNID.fullmatch(folder):
        return folder
    if labels is None:
        raise DataError(
            f"--val {path} tells no classes ({name} lies in no class folder). Give the labels with --devkit: "
            f"{LABEL_PLACES[0]} from image-net.org, or a file of file names and WordNet ids."
        )
    return labels.wnid(name)


def _members(paths: list[Path], found: Iterator[tuple[int, str, Place]], origin: str) -> Photos:
    rows = sorted((row for row in found if is_image(row[2].name)), key=lambda row: _file_name(row[2].name))
    if not rows:
        raise DataError(f"{origin} holds no photos.")
    return Members.of(paths, ((number, place) for number, _, place in rows)), [wnid for _, wnid, _ in rows]


def _class_folders(path: Path, listed: list[str], flag: str) -> Photos:
    names = [name for name in listed if is_image(name)]
    classes = [name.partition("/")[0] for name in names]
    strange = next((name for name, wnid in zip(names, classes, strict=True) if not WNID.fullmatch(wnid)), None)
    if strange is not None:
        raise DataError(
            f"{flag} {path}: {strange} lies in no class folder; expected folders named by WordNet ids, such as "
            "n01440764. For other images use prepare folder."
        )
    return _sorted_files(path, names, classes, flag)


def _sorted_files(path: Path, names: list[str], classes: list[str], flag: str) -> Photos:
    if not names:
        raise DataError(f"{flag} {path} holds no photos.")
    rows = sorted(zip(classes, names, strict=True), key=lambda row: _file_name(row[1]))
    return LooseFiles(path, [name for _, name in rows]), [wnid for wnid, _ in rows]


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]
