"""A fixed order that looks random and does not depend on what else is there: by a hash of the names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def hash_order(names: Iterable[str]) -> NDArray[np.int64]:
    """[n]: the rows of the names, sorted by the names' sha256.

    Labelled images are written in this order: in shards of one class after the other, a training batch would hold
    only the few classes that lie within the reach of the shuffle.
    """
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)
