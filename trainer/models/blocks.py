"""Building blocks of the UNet of Improved DDPM (Nichol & Dhariwal 2021, appendix A) and of its successor ADM.

ADM (Dhariwal & Nichol 2021, section 3) has residual blocks that halve or double their feature maps, as BigGAN's do,
and heads of a fixed width instead of a fixed number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

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
    """GroupNorm with float32 statistics whatever comes in, and an optional scale and shift of each image's own.

    32 groups as in the reference; widths that are no multiple of 32 take the most groups below that which divide
    them, so that small nets of neighbouring widths are normalised alike. (Below 64 channels a group can be a single
    channel: the bias before it is then idle, and its value nothing but rounding noise.)
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(max(g for g in range(1, 33) if num_channels % g == 0), num_channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], scale and shift [B, C] -> norm(x) * (1 + scale) + shift: [B, C, H, W]."""
        batch, channels, height, width = x.shape
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        groups = self.num_groups
        # The CPU's kernel reads bfloat16 and computes in float32 by itself: no copy of x is needed there.
        h = x if x.device.type == "cpu" else x.float()
        if scale is not None and shift is not None:
            # One pass instead of three: images become channels of a single one, so that each has its own weights.
            factor = 1 + scale.to(weight.dtype)
            weight, bias = (weight * factor).flatten(), torch.addcmul(shift.to(bias.dtype), bias, factor).flatten()
            h, groups = h.reshape(1, batch * channels, height, width), batch * groups
        return F.group_norm(h, groups, weight, bias, self.eps).view(x.shape).to(x.dtype)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution; on the CPU as the product of matrices that it is, which is up to twice as fast."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, H, W] -> [B, out, H, W]."""
        if x.device.type != "cpu":
            return super().forward(x)
        batch, _, height, width = x.shape
        assert self.bias is not None
        # Autocast would convert the weight after it is expanded, once an image.
        weight, bias = self.weight.flatten(1).to(x.dtype), self.bias[:, None].to(x.dtype)
        return torch.baddbmm(bias, weight.expand(batch, -1, -1), x.flatten(2)).view(batch, -1, height, width)


LayerT = TypeVar("LayerT", nn.Conv2d, PointwiseConv, nn.Linear)


def zeroed(module: LayerT) -> LayerT:
    """The same layer with zero weights, so that what it adds to starts as if it were not there."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


Resize = Literal["down", "up"]
RESIZE: dict[Resize | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "down": lambda: nn.AvgPool2d(2),
    "up": lambda: nn.Upsample(scale_factor=2.0, mode="nearest"),
}


def add_residual(x: Tensor, h: Tensor, *, rescale: bool) -> Tensor:
    """x + h; `rescale`: divided by sqrt(2), so that the sum varies no more than its parts (Song et al. 2021)."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


class LowResTimeEmbedding(nn.Module):
    """How noisy the low-resolution images are, as something that is added to the embedding of time.

    It starts at zero: the network begins as one that is not told, and so may go on from the weights of one that was
    trained without such noise.
    """

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = nn.Linear(channels, emb_channels)
        self.proj = zeroed(nn.Linear(emb_channels, emb_channels))

    def forward(self, low_res_time: Tensor | None) -> Tensor:
        """[B] -> [B, emb_channels]."""
        assert low_res_time is not None, "this network is to be told how noisy the low-resolution images are"
        out: Tensor = self.proj(F.silu(self.hidden(timestep_embedding(low_res_time, self.channels))))
        return out


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time (and class) embedding between them, and a skip connection.

    `resize`: halve or double height and width, before the first convolution and on the skip connection.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *,
        emb_channels: int, dropout: float, use_scale_shift_norm: bool, rescale: bool = False,
        resize: Resize | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.rescale = rescale
        self.resize = RESIZE[resize]()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else PointwiseConv(in_channels, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in, H, W], emb [B, emb_channels] (already through SiLU) -> [B, out, H, W], resized if so asked."""
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        emb = self.emb(emb)  # [B, out or 2 out]
        h = self.norm2(h, *emb.chunk(2, dim=1)) if self.use_scale_shift_norm else self.norm2(h + emb[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        return add_residual(self.skip(self.resize(x)), h, rescale=self.rescale)


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, as a residual.

    `order`: how the channels of `qkv` are divided, heads first and each into its q, k and v, or into q, k and v first
    and each of them into heads.
    """

    def __init__(
        self, channels: int, *,
        num_heads: int, order: Literal["heads_first", "qkv_first"] = "heads_first", rescale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads = num_heads
        self.order = order
        self.rescale = rescale
        self.norm = GroupNorm(channels)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.proj = zeroed(PointwiseConv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = x.shape
        heads_first = self.order == "heads_first"
        parts = (self.num_heads, 3) if heads_first else (3, self.num_heads)
        qkv = self.qkv(self.norm(x)).reshape(batch, *parts, channels // self.num_heads, height * width)
        h = attend(*qkv.unbind(dim=2 if heads_first else 1))  # [B, heads, C / heads, H * W]
        return add_residual(x, self.proj(h.reshape(x.shape)), rescale=self.rescale)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over N positions, scores scaled by d ** -0.5: three [B, heads, d, N] -> [B, heads, d, N].

    PyTorch's fused attention, except for few positions on the CPU: there the plain products are faster, in bfloat16
    (where the fused backward pass is slow) two to nine times.
    """
    few = 256 if q.dtype == torch.bfloat16 else 64
    if q.device.type == "cpu" and q.shape[-1] <= few:
        with torch.autocast("cpu", enabled=False):  # softmax reads and writes q's type, and is float32 inside
            scores = k.transpose(-1, -2) @ (q * q.shape[-2] ** -0.5)  # [B, heads, N of k, N of q]
            attended: Tensor = v @ scores.softmax(dim=-2)
            return attended
    # Copies are small, and without them the CPU falls back to an attention that is not fused. A GPU's asks only that a
    # position's features lie side by side, as a transformer's tokens have them.
    q, k, v = (part.transpose(-1, -2) for part in (q, k, v))  # [B, heads, N, d]
    if q.device.type == "cpu" or any(part.stride(-1) != 1 for part in (q, k, v)):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


class Downsample(nn.Conv2d):
    """Halves height and width with a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class UpsampledConv(nn.Conv2d):
    """A 3x3 convolution of the nearest-neighbour image of twice the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        if x.device.type != "cpu" or x.shape[-2] * x.shape[-1] < 256:
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Repeated pixels meet neighbouring taps, so the taps can be added first: a transposed 4x4 convolution of x
        # with 16 products a pixel of x instead of 36. On the CPU it is faster for all but small feature maps.
        taps = F.pad(self.weight, (1, 1, 1, 1))  # [out, in, 5, 5]
        taps = taps[..., :-1, :] + taps[..., 1:, :]
        taps = taps[..., :-1] + taps[..., 1:]  # [out, in, 4, 4]
        return F.conv_transpose2d(x, taps.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampledConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        upsampled: Tensor = self.conv(x)
        return upsampled
