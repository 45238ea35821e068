"""What looks random and yet hangs on names alone: an order and a share, by a hash of each name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_THRESHOLD_BYTES = 8  # of a hash, that decide whether a name is in a share


def hash_order(names: Iterable[str]) -> NDArray[np.int64]:
    """[n]: the rows of the names, sorted by the names' sha256.

    Labelled images are written in this order: in shards of one class after the other, a training batch would hold
    only the few classes that lie within the reach of the shuffle.
    """
    hashes = [_sha256(name) for name in names]
    return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)


def in_share(names: Iterable[str], share: float) -> NDArray[np.bool_]:
    """[n]: whether each name is in a share (0 to 1) of all possible names: its sha256 is below a threshold."""
    below = share * 256**_THRESHOLD_BYTES
    return np.array([int.from_bytes(_sha256(name)[:_THRESHOLD_BYTES], "big") < below for name in names], dtype=np.bool_)


def _sha256(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
