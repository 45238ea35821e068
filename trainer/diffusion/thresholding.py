"""How a predicted x_0 is kept within the range of images, which is [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# x_0 [B, C, H, W] to what is taken for it; each image's by itself.
Threshold = Callable[[Tensor], Tensor]


def static(x0: Tensor) -> Tensor:
    """Every value bounded to [-1, 1]."""
    return x0.clamp(-1, 1)


def dynamic(quantile: float) -> Threshold:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3).

    s is that quantile of an image's |x_0|, at least 1; the image is bounded to [-s, s] and divided by s. So strong
    guidance, whose x_0 leaves the range, does not saturate most pixels.
    """

    def threshold(x0: Tensor) -> Tensor:
        largest = _quantile(x0.abs().flatten(1), quantile).clamp(min=1)
        s = largest.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s

    return threshold


def _quantile(values: Tensor, quantile: float) -> Tensor:
    """The quantile of each row of [B, D], between two neighbours in proportion: [B].

    By the few largest values: torch.quantile sorts all and refuses more than 2^24 of them.
    """
    place = quantile * (values.shape[1] - 1)
    below = min(int(place), values.shape[1] - 2)
    largest = values.topk(values.shape[1] - below, dim=1).values
    return torch.lerp(largest[:, -1], largest[:, -2], place - below)
