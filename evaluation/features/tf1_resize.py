"""The bilinear resize of TensorFlow 1 (`ResizeBilinear`), bit for bit: the one that FID was defined with.

Pixel i of n is read at position i * (size / n): neither half-pixel centres nor aligned corners, so images shift towards
the top left and the last rows and columns repeat the border. It does not filter: shrinking skips pixels.

Reference: TensorFlow 1.15, `image_resizer_state.h` and `resize_bilinear_op.cc` (the CPU kernel, in float32).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] -> float32 [N, C, size, size] on the same device, in the units of the input.

    A pixel is `top + (bottom - top) * dy` with `top = left + (right - left) * dx`, each operation rounded to float32.
    No two of them may be fused, or the last bit changes. Each row is interpolated once for all pixels that read it.
    """
    x = _interpolate(images.float(), dim=3, size=size)  # [N, C, H, size]
    return _interpolate(x, dim=2, size=size)


def _interpolate(x: Tensor, dim: int, size: int) -> Tensor:
    lower, upper, fraction = source_positions(x.shape[dim], size)
    low = x.index_select(dim, torch.from_numpy(lower).to(x.device))
    high = x.index_select(dim, torch.from_numpy(upper).to(x.device))
    weight = torch.from_numpy(fraction).to(x.device)
    return high.sub_(low).mul_(weight if dim == 3 else weight[:, None]).add_(low)


def source_positions(size_in: int, size_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of each pixel along one axis, the source pixels before and after it and how far it lies between, [size_out]."""
    scale = np.float32(size_in) / np.float32(size_out)
    position = np.arange(size_out, dtype=np.float32) * scale
    lower = position.astype(np.int64)  # positions are not negative: this rounds down
    upper = np.minimum(lower + 1, size_in - 1)
    return lower, upper, position - lower.astype(np.float32)
