"""PNG images that a batch can be decoded from quickly.

Ordinary PNG files (any reader reads them) in one fixed form: 8-bit RGB, one IDAT chunk, and every row filtered "Up"
(stored as its difference to the row above, PNG specification, section 9). Undoing that filter is one addition a
row, done for a whole batch at once; the adaptive filters of other writers go byte by byte.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2  # the filter's number, in front of every row
_LEVEL = 6
_START = 33  # the signature and the whole header chunk
_DATA = _START + 8  # where the compressed rows begin: behind the IDAT chunk's length and name
_END = struct.pack(">I4sI", 0, b"IEND", isal_zlib.crc32(b"IEND"))


def encode(image: NDArray[np.uint8]) -> bytes:
    """PNG bytes of an image [H, W, 3]."""
    height, width, _ = image.shape
    rows = image.reshape(height, width * 3)
    filtered = np.empty((height, 1 + width * 3), dtype=np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256
    # zlib rather than isal, which compresses less; its strategy for filtered data is unpacked a tenth faster.
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_FILTERED)
    content = compressor.compress(filtered.tobytes()) + compressor.flush()
    return _start(height, width) + _chunk(b"IDAT", content) + _END


def empty_rows(num_images: int, height: int, width: int) -> NDArray[np.uint8]:
    """Room for the filtered rows of `num_images` images: [H, n, 1 + W * 3], so that equal rows lie together."""
    return np.empty((height, num_images, 1 + width * 3), dtype=np.uint8)


def inflate(payload: bytes, rows: NDArray[np.uint8]) -> bool:
    """Unpack an image's filtered rows into `rows` [H, 1 + W * 3]; False where it is not in this module's form.

    Raises:
        ValueError: it is in that form and damaged.
    """
    height, width = len(rows), rows.shape[1] // 3
    if payload[:_START] != _start(height, width) or payload[_START + 4 : _DATA] != b"IDAT":
        return False
    stop = _DATA + int.from_bytes(payload[_START : _START + 4], "big")
    if payload[stop + 4 :] != _END:
        return False
    try:
        content = isal_zlib.decompress(memoryview(payload)[_DATA:stop], bufsize=rows.size)
    except isal_zlib.error as error:  # type: ignore[misc]  # its stub calls the class an instance
        raise ValueError(str(error)) from None
    if len(content) != rows.size:
        raise ValueError(f"its rows are {len(content)} bytes instead of {rows.size}")
    if content[:: rows.shape[1]] != bytes([_UP]) * height:
        return False
    rows[:] = np.frombuffer(content, dtype=np.uint8).reshape(rows.shape)
    return True


def unfilter(rows: NDArray[np.uint8], images: NDArray[np.uint8]) -> None:
    """Filtered rows [H, n, 1 + W * 3] -> images [n, 3, H, W]; the rows are used up."""
    height, num_images, _ = rows.shape
    for y in range(1, height):
        np.add(rows[y], rows[y - 1], out=rows[y])  # modulo 256
    images[:] = rows[:, :, 1:].reshape(height, num_images, -1, 3).transpose(1, 3, 0, 2)


def _start(height: int, width: int) -> bytes:
    found = _STARTS.get((height, width))
    if found is None:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
        found = _STARTS[height, width] = _SIGNATURE + _chunk(b"IHDR", header)
    return found


_STARTS: dict[tuple[int, int], bytes] = {}


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", isal_zlib.crc32(name + content))
