"""Raw images: NumPy files of uint8 [C, H, W], the layout of a batch, so that reading is all there is to decoding."""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64  # of the data, as NumPy itself writes it


@lru_cache
def header(num_channels: int, height: int, width: int) -> bytes:
    """The bytes in front of the pixels (NumPy's format 1.0); the same for all images of a size."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({num_channels}, {height}, {width}), }}"
    taken = len(_MAGIC) + 2 + len(text) + 1
    text += " " * (-taken % _ALIGNMENT) + "\n"
    return _MAGIC + struct.pack("<H", len(text)) + text.encode("ascii")


def encode(image: NDArray[np.uint8]) -> bytes:
    """The NumPy file of an image [H, W, C], stored as [C, H, W]."""
    height, width, num_channels = image.shape
    pixels: bytes = image.transpose(2, 0, 1).tobytes()
    return header(num_channels, height, width) + pixels
