"""What every feature net asks of its images."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.errors import DataError


def check_images(images: Tensor) -> None:
    """Refuse anything but uint8 colour images [N, 3, H, W].

    Raises:
        DataError: another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise DataError(
            f"a feature net takes uint8 images [N, 3, H, W], not {images.dtype} {list(images.shape)}; "
            "repeat the channel of grey images three times, and scale floats to 0..255 first."
        )
