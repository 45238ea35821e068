"""`--size` and `--resize`: how a source's originals become the images of the data set."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.resize import DEFAULT_METHOD, METHODS


@dataclass(frozen=True)
class Sizing:
    """A size and a method, as the command line named them."""

    size: int
    method: str = DEFAULT_METHOD

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare `--size` and `--resize`."""
        parser.add_argument("--size", type=int, required=True, help="pixels a side of the prepared images")
        parser.add_argument(
            "--resize", choices=list(METHODS), default=DEFAULT_METHOD,
            help="improved-diffusion: halve, bicubic, centre crop (default); area: the whole picture squeezed, as the "
            "official downsampled ImageNet; area-centre-crop: the central square, averaged; "
            "none: the originals are of that size",
        )  # fmt: skip

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Sizing:
        """Raises a DataError for an impossible size."""
        if args.size < 1:
            raise DataError(f"--size is {args.size}; it must be at least 1.")
        return cls(args.size, args.resize)

    @property
    def stored_name(self) -> str:
        """The manifest's word for the method."""
        return METHODS[self.method].stored_name

    def options(self) -> dict[str, str | int | float | bool]:
        """What `Source.options` tells of it; the method only where it is not the default."""
        options: dict[str, str | int | float | bool] = {"size": self.size}
        if self.method != DEFAULT_METHOD:
            options["resize"] = self.method
        return options

    def enlarges(self, image: Image.Image) -> bool:
        """Whether a side of the original is smaller than what is made of it."""
        return min(image.size) < self.size

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image of any shape as [size, size, 3]."""
        return METHODS[self.method].resize(image, self.size)
