"""Batch norm of a finished network, as part of the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-3  # of all TensorFlow networks here


@torch.no_grad()
def fold_batch_norm(
    conv: nn.Conv2d, weight: Tensor, gain: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
) -> None:
    """Give `conv` (with a bias) the weights of convolution and batch norm, computed in float64.

    w' = w g / sqrt(var + eps), b' = beta - mean g / sqrt(var + eps)
    """
    assert conv.bias is not None
    scale = gain.double() / torch.sqrt(variance.double() + EPS)
    conv.weight.copy_(weight.double() * scale[:, None, None, None])
    conv.bias.copy_(beta.double() - mean.double() * scale)
