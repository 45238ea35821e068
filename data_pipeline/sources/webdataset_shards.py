"""Tar shards that others made in the WebDataset layout: KEY.jpg (jpeg, png, webp, npy) with KEY.cls beside it."""

from __future__ import annotations

import argparse
import glob
import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import codec
from data_pipeline.errors import DataError
from data_pipeline.index import NO_LABEL, Index, build_index, scan_shard
from data_pipeline.progress import progress_bar
from data_pipeline.sources import holdout
from data_pipeline.sources.archives import Members
from data_pipeline.sources.base import Collection, Source
from data_pipeline.sources.names import printable
from data_pipeline.sources.originals import OriginalsSplit, enlargement_remarks
from data_pipeline.sources.sizing import Sizing

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Shards:
    """Some shards, by folder or pattern."""

    pattern: str  # a folder, or a path with {000000..000146} or * ? []
    flag: str  # which the user gave it with, for errors

    def paths(self) -> list[Path]:
        """The tar files, in the order of the pattern, those of a * sorted.

        Raises:
            DataError: there are none, or one that the pattern names is missing.
        """
        if Path(self.pattern).is_dir():
            found = sorted(Path(self.pattern).glob("*.tar"))
        else:
            found = [Path(path) for one in expanded(self.pattern) for path in sorted(glob.glob(one)) or [one]]
        if not found:
            raise DataError(f"{self.flag} {self.pattern} holds no .tar files.")
        for path in found:
            if not path.is_file():
                raise DataError(f"{self.flag} {self.pattern}: there is no shard {path}.")
        return found

    def digest(self) -> str:
        """Hex sha256 of the shards' names and sizes."""
        listing = "".join(f"{path.name}\0{os.stat(path).st_size}\n" for path in self.paths())
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def scan(self) -> tuple[Members, Index]:
        """All samples, in their order, under a bar.

        Raises:
            DataError: a shard is damaged, or only some samples have labels.
        """
        paths = self.paths()
        bar = progress_bar(paths, total=len(paths), unit="shard", description=f"scan {self.flag}")
        index = build_index([list(scan_shard(path, codec.EXTENSIONS["any"])) for path in bar])
        if not len(index):
            kinds = ", ".join(codec.EXTENSIONS["any"])
            raise DataError(f"{self.flag} {self.pattern}: no shard holds images (members ending in {kinds}).")
        unlabelled = int((index.label == NO_LABEL).sum())
        if 0 < unlabelled < len(index):
            first = printable(_text(index.key[index.label == NO_LABEL][0]))
            raise DataError(
                f"{self.flag} {self.pattern}: {unlabelled:,} of {len(index):,} samples have no label (.cls member), "
                f"such as {first}: either all of them have one, or none."
            )
        if not unlabelled and index.label.min() < 0:
            raise DataError(f"{self.flag} {self.pattern}: there are negative labels; classes are counted from 0.")
        names = [f"{paths[shard].name}: {_text(key)}" for shard, key in zip(index.shard, index.key, strict=True)]
        stored = np.zeros(len(index), dtype=np.bool_)
        return Members(paths, names, index.shard, index.offset, index.size, stored), index


def _text(key: bytes) -> str:
    """A key as the names of files are read: it need not be UTF-8."""
    return key.decode("utf-8", "surrogateescape")


def expanded(pattern: str) -> list[str]:
    """Every {a,b} and {000..146} of a pattern written out, as a shell does."""
    parts = _BRACES.split(pattern)  # text, braces' content, text, ...
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(content: str) -> list[str]:
    numbers = _RANGE.fullmatch(content)
    if not numbers:
        return content.split(",")
    first, last = numbers.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


@dataclass(frozen=True)
class WebDatasetShards(Source):
    """Tar shards of images that others made (WebDataset)."""

    train: Shards
    test: Shards | None
    sizing: Sizing
    holdout: float  # share of the samples that goes to the test split; 0 where `test` is given
    kind = "webdataset"

    @property
    def name(self) -> str:
        """The name of the folder that the shards lie in."""
        path = Path(self.train.pattern)
        return printable((path if path.is_dir() else path.parent).resolve().name) or "webdataset"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--from", dest="origin", metavar="SHARDS", required=True,
            help="a folder of .tar files, or a pattern in quotes: 'shards-{000000..000146}.tar', 'train-*.tar'",
        )  # fmt: skip
        holdout.add_arguments(parser, test="the test shards, likewise", metavar="SHARDS")
        Sizing.add_arguments(parser)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> WebDatasetShards:
        return cls(
            Shards(args.origin, "--from"), None if args.test is None else Shards(args.test, "--test"),
            Sizing.from_arguments(args), holdout.from_arguments(args),
        )  # fmt: skip

    def options(self) -> dict[str, str | int | float | bool]:
        options = {"shards_sha256": self.train.digest(), **self.sizing.options(), "holdout": self.holdout}
        if self.test:
            options["test_shards_sha256"] = self.test.digest()
        return options

    def files(self) -> list[str]:
        return [str(path) for shards in (self.train, self.test) if shards for path in shards.paths()]

    def split_names(self) -> list[str]:
        return ["train", "test"] if self.test or self.holdout > 0 else ["train"]

    def open(self, workspace: Path) -> Collection:
        members, index = self.train.scan()
        if self.test:
            test_members, test_index = self.test.scan()
            splits = {
                "train": OriginalsSplit(members, np.arange(len(index)), index.label, self.sizing),
                "test": OriginalsSplit(test_members, np.arange(len(test_index)), test_index.label, self.sizing),
            }
        else:
            keys = [_text(key) for key in index.key]
            is_test = holdout.held_out(keys, self.holdout, origin=f"--from {self.train.pattern}")
            splits = {}
            for name in self.split_names():
                rows = np.flatnonzero(is_test == (name == "test"))
                splits[name] = OriginalsSplit(members, rows, index.label[rows], self.sizing)
        num_classes = 1 + max(int(split.labels.max()) for split in splits.values())
        self._check_labels(splits)
        return Collection(
            image_size=self.sizing.size, class_names=[f"class {number}" for number in range(num_classes)],
            preprocessing=self.sizing.stored_name, origin=f"WebDataset shards {self.name}", splits=dict(splits),
            remarks=lambda: enlargement_remarks(splits, self.sizing.size),
        )  # fmt: skip

    def _check_labels(self, splits: dict[str, OriginalsSplit]) -> None:
        if len({bool((split.labels == NO_LABEL).any()) for split in splits.values()}) > 1:
            raise DataError(
                f"only one of --from {self.train.pattern} and --test has labels (.cls members): both, or none."
            )
