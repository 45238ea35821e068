"""Small generated colour images with structure, for tests and smoke studies: no download, any size and number.

Each is a gradient between two colours, some soft blobs, and a wave texture whose frequency and tint tell the class;
a little noise keeps the last bits from being predictable. Image number i depends on (seed, split, i) alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator
from data_pipeline.errors import DataError
from data_pipeline.index import NO_LABEL
from data_pipeline.sources.base import Collection, Source, Split

_TEST_START = 1 << 40  # images of the test split are numbered from here: no image is in both
_NOISE = 2.0  # standard deviation, grey levels


@dataclass(frozen=True)
class GeneratedSplit:
    """Images first .. first + num_images - 1 of the generator."""

    first: int
    num_images: int
    size: int
    num_classes: int
    seed: int

    def __len__(self) -> int:
        return self.num_images

    def load(self, position: int) -> tuple[NDArray[np.uint8], int]:
        rng = generator(self.seed, Stream.GENERATED, self.first + position)
        label = position % self.num_classes if self.num_classes else NO_LABEL
        return _draw(rng, self.size, label, max(self.num_classes, 1)), label


@dataclass(frozen=True)
class Generated(Source):
    """Small generated colour images, for tests and trial runs: nothing is downloaded."""

    size: int
    num_train: int
    num_test: int
    num_classes: int
    seed: int
    kind = "generated"

    @property
    def name(self) -> str:
        return "generated"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=int, default=32, help="pixels a side (default 32)")
        parser.add_argument("--num-train", type=int, default=1024, help="training images (default 1024)")
        parser.add_argument("--num-test", type=int, default=256, help="held-out images (default 256)")
        parser.add_argument("--num-classes", type=int, default=4, help="classes; 0 = unlabelled (default 4)")
        parser.add_argument("--seed", type=int, default=0, help="another seed, other images (default 0)")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Generated:
        for flag, value, least in (
            ("--size", args.size, 4), ("--num-train", args.num_train, 1), ("--num-test", args.num_test, 1),
            ("--num-classes", args.num_classes, 0), ("--seed", args.seed, 0),
        ):  # fmt: skip
            if value < least:
                raise DataError(f"{flag} is {value}; it must be at least {least}.")
        return cls(args.size, args.num_train, args.num_test, args.num_classes, args.seed)

    def options(self) -> dict[str, str | int | float | bool]:
        return {
            "size": self.size, "num_train": self.num_train, "num_test": self.num_test,
            "num_classes": self.num_classes, "seed": self.seed,
        }  # fmt: skip

    def split_names(self) -> list[str]:
        return ["train", "test"]

    def open(self, workspace: Path) -> Collection:
        def split(first: int, num_images: int) -> Split:
            return GeneratedSplit(first, num_images, self.size, self.num_classes, self.seed)

        return Collection(
            image_size=self.size,
            class_names=[f"texture {number}" for number in range(self.num_classes)],
            preprocessing="none",
            origin="data_pipeline/sources/generated.py",
            splits={"train": split(0, self.num_train), "test": split(_TEST_START, self.num_test)},
        )


def _draw(rng: np.random.Generator, size: int, label: int, num_classes: int) -> NDArray[np.uint8]:
    axis = np.linspace(-1.0, 1.0, size)
    y, x = axis[:, None], axis[None, :]  # [S, 1], [1, S]
    image = _gradient(rng, y, x)
    for _ in range(3):
        image = _with_blob(rng, image, y, x)
    image += _texture(rng, y, x, max(label, 0) / num_classes)
    image = 127.5 + 100.0 * image + _NOISE * rng.standard_normal(image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _gradient(rng: np.random.Generator, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = rng.uniform(0, 2 * np.pi)
    first, second = rng.uniform(-0.7, 0.7, (2, 3))  # colours, in -1 .. 1
    along = 0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)  # [S, S], 0 .. 1
    return np.asarray(first + along[:, :, None] * (second - first))


def _with_blob(
    rng: np.random.Generator, image: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    centre_y, centre_x = rng.uniform(-0.8, 0.8, 2)
    radius = rng.uniform(0.15, 0.5)
    colour = rng.uniform(-1.0, 1.0, 3)
    cover = np.exp(-((((y - centre_y) ** 2 + (x - centre_x) ** 2) / radius**2) ** 2))  # [S, S]: flat inside, soft edge
    return np.asarray(image + cover[:, :, None] * (colour - image))


def _texture(
    rng: np.random.Generator, y: NDArray[np.float64], x: NDArray[np.float64], kind: float
) -> NDArray[np.float64]:
    """A wave; `kind` in [0, 1) sets its frequency and tint."""
    frequency = np.pi * (1.5 + 4.0 * kind)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    wave = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)  # [S, S]
    tint = 0.5 + 0.5 * np.cos(2 * np.pi * (kind + np.array([0.0, 1 / 3, 2 / 3])))  # [3]
    return np.asarray(0.2 * wave[:, :, None] * tint)
