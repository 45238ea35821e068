"""How one image is stored in a shard. Lossless, and the same pixels always give the same bytes."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

EXTENSION = "png"  # of the image member in a shard, and the manifest's `encoding`


def encode(image: NDArray[np.uint8]) -> bytes:
    """PNG bytes of an image [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode(payload: bytes) -> NDArray[np.uint8]:
    """The image [H, W, 3] of PNG bytes.

    Raises:
        ValueError, OSError, SyntaxError: the bytes are no complete RGB PNG.
    """
    # The plug-in itself rather than Image.open: no guessing of the format.
    with PngImagePlugin.PngImageFile(io.BytesIO(payload)) as image:
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB image, found mode {image.mode}")
        return np.asarray(image)
