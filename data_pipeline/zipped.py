"""Members of zip archives, npz files among them, used where they lie."""

from __future__ import annotations

import struct
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<26xHH")  # of a member: the lengths of its name and of its extra field


def content_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the stored bytes of a member begin in the archive's open `file`.

    Raises:
        struct.error: the archive ends before it.
    """
    file.seek(entry.header_offset)
    num_bytes: int = _HEADER.size + sum(_HEADER.unpack(file.read(_HEADER.size)))
    return entry.header_offset + num_bytes


def mapped_array(path: Path, offset: int, num_bytes: int) -> NDArray[Any]:
    """The array of a NumPy file that lies in `num_bytes` bytes of `path` from `offset` on, mapped read-only.

    Raises:
        ValueError, TypeError, OverflowError, OSError: there is none, it holds Python objects, or it is larger.
    """
    formats = np.lib.format
    with open(path, "rb") as file:
        file.seek(offset)
        version = formats.read_magic(file)
        header = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        shape, fortran_order, dtype = header(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError("Python objects")
    if min(shape, default=1) < 0 or start + prod(shape) * dtype.itemsize > offset + num_bytes:
        raise ValueError(f"an array {list(shape)} of {dtype} in {num_bytes:,} bytes")
    mapped = np.memmap(path, dtype, mode="r", offset=start, shape=shape, order="F" if fortran_order else "C")
    return mapped.view(np.ndarray)
