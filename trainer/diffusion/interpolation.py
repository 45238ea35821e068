"""Between two images, in the latents of a diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor


def lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) a + weight b: what Ho et al. 2020 (section 4.4) do with x_t.

    Args:
        a, b: [C, H, W].
        weight: [n], from 0 (a) to 1 (b).

    Returns [n, C, H, W].
    """
    weight = _shaped(weight, a)
    return (1 - weight) * a + weight * b


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Along the arc between a and b, which keeps the length of a Gaussian latent (Song et al. 2021, eq. 67).

    Arguments and result as for `lerp`, which it becomes where the two are (nearly) parallel.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return lerp(a, b, weight)
    weight = _shaped(weight, a)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / angle.sin()


def _shaped(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like).view(-1, *[1] * like.ndim)
