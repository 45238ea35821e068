"""Originals of any size and kind -> square RGB images, by named methods that the manifest records."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

CENTRE_CROP = "box-bicubic-centre-crop"


def centre_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of an RGB image at `size` pixels: [size, size, 3].

    Halved by box averaging while both sides stay at least `size`, then bicubic to a short side of `size`, then cropped:
    the convention of Nichol & Dhariwal 2021 ("Improved DDPM") for their own images. Smaller originals are enlarged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened file as upright 8-bit RGB: EXIF rotation applied, transparency over white, 16-bit grey scaled."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")
