"""What a source of images is, to `prepare`."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError


class UnreadableImageError(DataError):
    """One original cannot be read; `prepare` lists it and goes on."""


class Split(Protocol):
    """The images of one split, in a fixed order."""

    def __len__(self) -> int: ...

    def load(self, position: int) -> tuple[NDArray[np.uint8], int]:
        """Image [S, S, 3] and label (-1: none) number `position`; also in processes forked after the source was opened.

        Raises:
            UnreadableImageError: names the file and what is wrong with it.
        """
        ...


@dataclass(frozen=True)
class Collection:
    """An opened source."""

    image_size: int
    class_names: list[str]  # empty: unlabelled
    preprocessing: str
    origin: str  # what answered, for the reader
    splits: dict[str, Split]  # by name: "train", "test"
    remarks: Callable[[], list[str]] = list  # what the reader should know once the images were loaded


class Source(ABC):
    """A source as the command line described it, not opened yet."""

    kind: ClassVar[str]  # the command line's word for it

    @property
    @abstractmethod
    def name(self) -> str:
        """The data set's name."""

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the source's own options."""

    @classmethod
    @abstractmethod
    def from_arguments(cls, args: argparse.Namespace) -> Source:
        """Build it; impossible values raise a DataError."""

    @abstractmethod
    def options(self) -> dict[str, str | int | float | bool]:
        """All that decides which images come out; must be quick, it says whether a folder is up to date."""

    def files(self) -> Iterable[str]:
        """Paths of the files that the images come from, where somebody may change them between two runs; quick, too.

        An unfinished result is gone on with only while their sizes and times of change stay the same.
        """
        return ()

    @abstractmethod
    def split_names(self) -> list[str]:
        """The splits that `open` will give."""

    @abstractmethod
    def open(self, workspace: Path) -> Collection:
        """Find the images, fetching them into `workspace` (removed afterwards) if need be."""
