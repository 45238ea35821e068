"""The two densities of the bound: KL between Gaussians, and a Gaussian's mass in an 8-bit bin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_BIN = 1.0 / 255.0  # images are k / 127.5 - 1, k = 0 .. 255: bins of width 2 / 255
LAST_BIN = 0.999  # beyond ±0.999 lie only the outermost bins, which are open-ended
TINY = 1e-20


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) elementwise, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.exp(difference) - 1 - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Exact log of a Gaussian's mass in the 8-bit bin around x, elementwise, in nats (Ho et al. 2020, eq. 13)."""
    inverse_scale = torch.exp(-log_scale)
    centered = x - mean
    left = torch.special.log_ndtr((centered + HALF_BIN) * inverse_scale)  # everything below the first bin's top
    right = torch.special.log_ndtr(-(centered - HALF_BIN) * inverse_scale)
    inner = _log_mass(centered.abs() * inverse_scale, HALF_BIN * inverse_scale)
    return torch.where(x < -LAST_BIN, left, torch.where(x > LAST_BIN, right, inner))


def _log_mass(distance: Tensor, half_width: Tensor) -> Tensor:
    """Log of the standard normal's mass within half_width of a point at this distance from 0, elementwise.

    By symmetry the bin lies in the lower tail, where log Φ keeps full relative precision; the difference of the two
    CDFs is taken in log space, so that no mass is clamped or cancels. Where the bin is so narrow that even the logs
    cancel, the density's change across it is exponential to within half_width² / 2, and integrated as such.
    """
    narrow = half_width < torch.finfo(half_width.dtype).eps ** (1 / 3)
    upper = torch.special.log_ndtr(half_width - distance)
    lower = torch.special.log_ndtr(-half_width - distance)
    # Bounded away from 0, so that the branch that is not taken has a finite gradient.
    difference = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-TINY)))
    slope = (distance * half_width).clamp(min=TINY)
    growth = slope + torch.log(-torch.expm1(-2 * slope) / slope)  # log of 2 sinh(slope) / slope
    density = -0.5 * distance.square() - 0.5 * math.log(2 * math.pi) + torch.log(half_width) + growth
    return torch.where(narrow, density, difference)


def mean_bits(nats: Tensor) -> Tensor:
    """Mean over an image's dimensions, in bits: [B, C, H, W] -> [B]."""
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
