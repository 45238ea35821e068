"""Building blocks of the Improved DDPM UNet (Nichol & Dhariwal 2021, appendix A)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of (fractional) timesteps, cosines first: [B] -> [B, dim] (Vaswani et al. 2017)."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm computed in float32 whatever comes in.

    32 groups as in the reference; widths that are no multiple of 32 take the most groups below that which divide
    them, so that small nets of neighbouring widths are normalised alike. (Below 64 channels a group can be a single
    channel: the bias before it is then idle, and its value nothing but rounding noise.)
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(max(g for g in range(1, 33) if num_channels % g == 0), num_channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with zero weights, so that its residual branch starts as the identity."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time (and class) embedding between them, and a skip connection."""

    def __init__(
        self, in_channels: int, out_channels: int, *, emb_channels: int, dropout: float, use_scale_shift_norm: bool
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in, H, W], emb [B, emb_channels] (already through SiLU) -> [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.emb(emb).to(h.dtype)[:, :, None, None]  # [B, out or 2 out, 1, 1]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + emb)
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return out


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, as a residual."""

    def __init__(self, channels: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x))
        # Heads are the outer split and q, k, v the inner one: the reference's order, kept so that its weights fit.
        qkv = qkv.reshape(batch, self.num_heads, 3, channels // self.num_heads, height * width)
        # Contiguous copies are small, and without them the CPU falls back to an attention that is not fused.
        q, k, v = (part.contiguous() for part in qkv.transpose(-1, -2).unbind(dim=2))  # [B, heads, H * W, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)  # scores scaled by (C / heads) ** -0.5
        h = h.transpose(-1, -2).reshape(batch, channels, height, width)
        projected: Tensor = self.proj(h)
        return x + projected


class Downsample(nn.Conv2d):
    """Halves height and width with a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        upsampled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return upsampled
