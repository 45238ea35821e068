"""The two densities of the bound: KL between Gaussians, and a Gaussian's mass in an 8-bit bin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_BIN = 1.0 / 255.0  # images are k / 127.5 - 1, k = 0 .. 255: bins of width 2 / 255
LAST_BIN = 0.999  # beyond ±0.999 lie only the outermost bins, which are open-ended


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) elementwise, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.exp(difference) - 1 - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Exact log of a Gaussian's mass in the 8-bit bin around x, elementwise, in nats (Ho et al. 2020, eq. 13).

    By symmetry the bin is mirrored to the lower tail, where log Φ keeps full relative precision; the difference
    of the two CDFs is then taken in log space, so that no bin's mass is clamped or cancels.
    """
    inverse_scale = torch.exp(-log_scale)
    centered = x - mean
    folded = -centered.abs()
    upper = torch.special.log_ndtr((folded + HALF_BIN) * inverse_scale)
    lower = torch.special.log_ndtr((folded - HALF_BIN) * inverse_scale)
    inner = upper + torch.log(-torch.expm1(lower - upper))
    left = torch.special.log_ndtr((centered + HALF_BIN) * inverse_scale)  # everything below the first bin's top
    right = torch.special.log_ndtr(-(centered - HALF_BIN) * inverse_scale)
    return torch.where(x < -LAST_BIN, left, torch.where(x > LAST_BIN, right, inner))


def mean_bits(nats: Tensor) -> Tensor:
    """Mean over an image's dimensions, in bits: [B, C, H, W] -> [B]."""
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
