"""Which images of a set without a split of its own are held out for testing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.sources.hash_order import in_share

DEFAULT_HOLDOUT = 0.1


def add_arguments(parser: argparse.ArgumentParser, *, test: str, metavar: str) -> None:
    """Declare `--holdout` and `--test`, of which one may be given."""
    parser.add_argument("--test", metavar=metavar, help=f"{test} (instead of --holdout)")
    parser.add_argument("--holdout", type=float, help=f"share held out as test/, about (default {DEFAULT_HOLDOUT:g})")


def from_arguments(args: argparse.Namespace) -> float:
    """The share to hold out; 0 where test images were given.

    Raises:
        DataError: both were given, or the share is impossible.
    """
    if args.test is not None:
        if args.holdout is not None:
            raise DataError(f"--test {args.test} and --holdout {args.holdout:g}: give one of the two.")
        return 0.0
    holdout = DEFAULT_HOLDOUT if args.holdout is None else float(args.holdout)
    if not 0 <= holdout < 1:
        raise DataError(f"--holdout is {holdout}; it must be at least 0 and below 1.")
    return holdout


def held_out(names: Sequence[str], share: float, *, origin: str) -> NDArray[np.bool_]:
    """[n]: whether each is held out. A hash of its own name alone decides, so it never changes with the others.

    Raises:
        DataError: none is held out of a share above 0, or all are; `origin` says where they come from.
    """
    chosen = in_share(names, share)
    num_test = int(chosen.sum())
    if num_test == len(names) or (share > 0 and num_test == 0):
        raise DataError(
            f"{origin}: --holdout {share:g} holds out {num_test} of {len(names)} images (a hash of each name decides). "
            "There are too few for that share: try another, give test images with --test, or none with --holdout 0."
        )
    return chosen
