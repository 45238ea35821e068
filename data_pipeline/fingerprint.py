"""The identity of a set of images: which pixels and labels, in which order; not how they are stored.

Every sample has a digest of its own, and the fingerprint is the digest of these in key order. It is therefore the
same for any shard size, image encoding or compression level, and workers can compute their parts independently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def sample_digest(image: NDArray[np.uint8], label: int) -> bytes:
    """sha256 (32 bytes) of one image [H, W, C] and its label (-1: none)."""
    height, width, num_channels = image.shape
    digest = hashlib.sha256(f"{height}x{width}x{num_channels} {label}\n".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def fingerprint(digests: Iterable[bytes]) -> str:
    """Hex fingerprint of the samples whose digests are given in key order."""
    total = hashlib.sha256()
    for digest in digests:
        total.update(digest)
    return total.hexdigest()
