"""Originals of any size and kind -> square RGB images, by named methods that the manifest records."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CENTRE_CROP = "box-bicubic-centre-crop"

_ORIENTATION = 0x0112  # EXIF's tag for how the camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the others undo themselves


def centre_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of an RGB image at `size` pixels: [size, size, 3].

    Halved by box averaging while both sides stay at least `size`, then bicubic to a short side of `size`, then cropped:
    the convention of Nichol & Dhariwal 2021 ("Improved DDPM") for their own images. Smaller originals are enlarged.
    RGB originals come out as from their published code, pixel for pixel. Others do not quite: there they are resized as
    stored and converted to RGB at the end, here `to_rgb` comes first (of CMYK, levels differ by up to some 20).

    Raises:
        ValueError: it is so narrow that at this size it would exceed Pillow's limit of pixels before the crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too narrow: at {width}x{height} pixels, to be cropped to {size}x{size}, it is too large")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def area_squeeze(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The whole RGB image squeezed into a square, every pixel the mean of the area that it covers: [size, size, 3].

    The convention of the official downsampled ImageNet (Chrabaszcz et al. 2017): one box-filtered resize of the whole
    picture to size x size. Nothing is cropped, so proportions are lost. Smaller originals are enlarged (their pixels
    repeated).
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def area_centre_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The largest central square of an RGB image, every pixel the mean of the area that it covers: [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, box=box))


def unchanged(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """An RGB image that already is of the size: [size, size, 3].

    Raises:
        ValueError: it is not.
    """
    if image.size != (size, size):
        raise ValueError(f"it is {image.width}x{image.height}, expected {size}x{size} (--resize none)")
    return np.asarray(image)


class ResizeMethod(NamedTuple):
    """A way from any original to a square."""

    stored_name: str  # the manifest's word for it
    resize: Callable[[Image.Image, int], NDArray[np.uint8]]  # (RGB image, size) -> [size, size, 3]


DEFAULT_METHOD = "improved-diffusion"
METHODS = {  # by the command line's word
    DEFAULT_METHOD: ResizeMethod(CENTRE_CROP, centre_crop),
    "area": ResizeMethod("area-squeeze", area_squeeze),
    "area-centre-crop": ResizeMethod("area-centre-crop", area_centre_crop),
    "none": ResizeMethod("none", unchanged),
}


def to_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """An opened file as 8-bit RGB; of an animation the first frame.

    Transparency (alpha, palette entries, a colour declared transparent) is laid over white. 16-bit samples keep their
    high byte, grey and colour alike. CMYK goes the plain way of Pillow, without colour profiles; Adobe's inverted
    CMYK JPEGs come out right. With `upright`, the EXIF rotation is applied; without, the pixels stay as stored.

    Raises:
        ValueError: the samples have no known range (floating point, more than 16 bits).
        OSError, SyntaxError: the file is truncated or damaged.
    """
    turn = _turn_when_loaded(image, upright=upright)
    image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _turn_when_loaded(image: Image.Image, *, upright: bool) -> Image.Transpose | None:
    """Load the pixels of an opened file; returns the turn that they need then."""
    before = _orientation(image)
    image.load()
    after = _orientation(image)  # a TIFF has been turned while it was loaded, and its tag taken away
    if upright:
        return _UPRIGHT.get(after)
    return _BACK.get(before) if after != before else None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # junk in the EXIF block fails in many ways, and does not make the picture worse
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits, as Pillow itself does for colour; its own conversion of grey would clip at 255."""
    if image.mode == "F":
        raise ValueError("floating-point samples have no known range: convert the file to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"samples of {values.min()} to {values.max()} are beyond 16 bits: convert the file")
    return Image.fromarray((values >> 8).astype(np.uint8))
