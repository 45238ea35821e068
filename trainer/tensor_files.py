"""Writes safetensors files as a stream: one tensor in memory at a time, hashed on the way.

The safetensors library reads them; its own writer wants all tensors at once, copies them and leaves the checksum to a
second reading. The format is a length, a JSON header and the tensors' bytes, one after another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}  # those that are kept
_ALIGNMENT = 8
_CHUNK = 16 << 20


def write_tensors(
    path: Path, specs: Mapping[str, tuple[Shape, torch.dtype]], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Write the tensors named in `specs`, asking `read` for one after another, through to the disk.

    Returns {"bytes": size, "sha256": hex digest} of the file. Raises OSError, and leaves half a file then.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in specs.items():
            tensor = read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):
                write(data[start : start + _CHUNK])
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_mapping(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`write_tensors` of tensors that are in memory."""
    return write_tensors(path, {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}, tensors.__getitem__)
