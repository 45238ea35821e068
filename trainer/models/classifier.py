"""The noisy classifier: a UNet's encoder and middle, pooled to the logits of p(class | x_t).

Dhariwal & Nichol 2021, section 4 and appendix H: its gradient with respect to x_t guides a diffusion model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model import ClassifierConfig
from trainer.models.blocks import GroupNorm, PointwiseConv, attend, zeroed
from trainer.models.encoder import EncoderNetwork

HIDDEN = 2048  # width of the hidden layer behind the spatial pools


class Classifier(EncoderNetwork):
    """The encoder and middle, then one of four pools; attention is what the published classifiers have."""

    def __init__(self, config: ClassifierConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__(config, in_channels=in_channels)
        channels = config.widths[-1]
        self.pool: nn.Module
        if config.pool == "attention":
            num_heads = config.heads_of(channels)
            self.pool = AttentionPool(channels, out_channels, size=config.sizes[-1], num_heads=num_heads)
        elif config.pool == "adaptive":
            self.pool = AdaptivePool(channels, out_channels)
        else:
            self.pool = SpatialPool(sum(self.skip_channels) + channels, out_channels, norm=config.pool == "spatial_v2")

    def forward(self, x: Tensor, timesteps: Tensor, *conditions: Tensor | None) -> Tensor:
        """x [B, C, H, W], timesteps [B] (float) -> logits [B, num_classes] (float32).

        The conditions are there so that all networks are called alike, and not looked at. Raises ValueError for images
        of another size than `model.image_size`.
        """
        size = self.config.image_size
        if x.shape[-2:] != (size, size):
            raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]}: this classifier was made for {size}x{size}")
        h, skips = self.encode(x, self.embed(timesteps))
        logits: Tensor = self.pool([*skips, h])
        return logits.float()


class AttentionPool(nn.Module):
    """One attention from the mean over all positions to each of them (as in Radford et al. 2021, CLIP)."""

    def __init__(self, channels: int, num_classes: int, *, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.position = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        """The last of the feature maps, [B, C, S, S] -> [B, num_classes]."""
        h = F.silu(self.norm(features[-1])).flatten(2)  # [B, C, S * S]
        h = torch.cat([h.mean(dim=-1, keepdim=True), h], dim=-1) + self.position.to(h.dtype)  # [B, C, 1 + S * S]
        qkv = self.qkv(h.transpose(1, 2)).transpose(1, 2)  # [B, 3 C, 1 + S * S]
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(dim=1)  # [B, heads, C / heads, 1 + S * S]
        pooled = attend(q[..., :1], k, v).flatten(1)  # [B, C]: what the mean attends to
        logits: Tensor = self.proj(pooled)
        return logits


class AdaptivePool(nn.Module):
    """The mean over all positions."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.proj = zeroed(PointwiseConv(channels, num_classes))

    def forward(self, features: list[Tensor]) -> Tensor:
        """The last of the feature maps, [B, C, S, S] -> [B, num_classes]."""
        h = F.silu(self.norm(features[-1])).mean(dim=(2, 3), keepdim=True)
        logits: Tensor = self.proj(h).flatten(1)
        return logits


class SpatialPool(nn.Module):
    """The means of all the encoder's feature maps, through one hidden layer, with or without a norm in it."""

    def __init__(self, channels: int, num_classes: int, *, norm: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, HIDDEN)
        self.norm = GroupNorm(HIDDEN) if norm else None
        self.proj = nn.Linear(HIDDEN, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Feature maps [B, .., .., ..] -> [B, num_classes]."""
        h = self.hidden(torch.cat([f.mean(dim=(2, 3)) for f in features], dim=1))  # [B, HIDDEN]
        h = F.relu(h) if self.norm is None else F.silu(self.norm(h[:, :, None, None]).flatten(1))
        logits: Tensor = self.proj(h)
        return logits
