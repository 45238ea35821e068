"""How one image is stored in a shard, by name; lossless, and the same pixels always give the same bytes."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from data_pipeline import npy, png
from data_pipeline.resize import to_rgb

Encoding = Literal["png", "npy", "any"]  # "any": whatever others put into their shards; we write the first two
EXTENSIONS: dict[Encoding, tuple[str, ...]] = {  # of the image's member in a shard
    "png": ("png",),
    "npy": ("npy",),
    "any": ("png", "jpg", "jpeg", "webp", "npy"),
}
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP")


def encode(image: NDArray[np.uint8], encoding: Encoding = "png") -> bytes:
    """The stored bytes of an image [H, W, 3]."""
    assert encoding != "any"
    return png.encode(image) if encoding == "png" else npy.encode(image)


def decode(payload: bytes, encoding: Encoding = "png") -> NDArray[np.uint8]:
    """The image [H, W, 3] of stored bytes.

    Raises:
        ValueError, OSError, SyntaxError: they are no complete image of that encoding.
    """
    if encoding == "png":
        return _decode_png(payload)
    if encoding == "npy" or payload.startswith(b"\x93NUMPY"):
        return _decode_npy(payload)
    with Image.open(io.BytesIO(payload), formats=_PILLOW_FORMATS) as image:
        return np.asarray(to_rgb(image))


def recognise(payload: bytes) -> tuple[NDArray[np.uint8], Encoding]:
    """The image [H, W, 3] of the bytes that somebody else stored, and the strictest encoding that they follow.

    Raises:
        ValueError, OSError, SyntaxError: they are no complete image.
    """
    with suppress(ValueError, OSError, SyntaxError):
        return _decode_png(payload), "png"
    image = decode(payload, "any")
    height, width, num_channels = image.shape
    return image, "npy" if payload.startswith(npy.header(num_channels, height, width)) else "any"


def _decode_png(payload: bytes) -> NDArray[np.uint8]:
    # The plug-in itself rather than Image.open: no guessing of the format.
    with PngImagePlugin.PngImageFile(io.BytesIO(payload)) as image:
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB image, found mode {image.mode}")
        return np.asarray(image)


def _decode_npy(payload: bytes) -> NDArray[np.uint8]:
    image = np.load(io.BytesIO(payload), allow_pickle=False)
    if image.dtype != np.uint8 or image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
        raise ValueError(f"expected uint8 of [3, H, W] or [H, W, 3], found {image.dtype} of {list(image.shape)}")
    return np.asarray(image if image.shape[2] == 3 and image.shape[0] != 3 else image.transpose(1, 2, 0))
