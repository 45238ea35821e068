"""The UNet of Improved DDPM, unconditional, class-conditional or super-resolving."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.blocks import (
    Attention,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    timestep_embedding,
    zeroed,
)


class UNetBlock(nn.Module):
    """A ResBlock, with self-attention behind it at the resolutions that have it."""

    def __init__(self, res: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.res = res
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h: Tensor = self.res(x, emb)
        return h if self.attention is None else self.attention(h)


class UNet(nn.Module):
    """Encoder, middle and decoder with skip connections from every encoder step to its decoder twin.

    The decoder has one block a level more than the encoder, since the encoder's first convolution and its
    downsamplings are skipped to as well.
    """

    def __init__(self, config: ModelConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        emb_channels = 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.class_embed = nn.Embedding(config.num_classes, emb_channels) if config.num_classes else None

        def block(channels_in: int, channels_out: int, *, attention: bool) -> UNetBlock:
            res = ResBlock(
                channels_in, channels_out,
                emb_channels=emb_channels, dropout=config.dropout, use_scale_shift_norm=config.use_scale_shift_norm,
            )  # fmt: skip
            return UNetBlock(res, Attention(channels_out, num_heads=config.num_heads) if attention else None)

        channels = config.channels * config.channel_mult[0]
        self.stem = nn.Conv2d(in_channels * (2 if config.low_res_size else 1), channels, 3, padding=1)
        skips = [channels]
        size = config.image_size
        self.encoder = nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            if level > 0:
                self.encoder.append(Downsample(channels))
                skips.append(channels)
                size //= 2
            for _ in range(config.num_res_blocks):
                width = config.channels * mult
                self.encoder.append(block(channels, width, attention=size in config.attention_resolutions))
                channels = width
                skips.append(channels)

        self.middle = nn.ModuleList(block(channels, channels, attention=attention) for attention in (True, False))

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(config.num_res_blocks + 1):
                width = config.channels * mult
                self.decoder.append(
                    block(channels + skips.pop(), width, attention=size in config.attention_resolutions)
                )
                channels = width
            if level > 0:
                self.decoder.append(Upsample(channels))
                size *= 2
        assert not skips

        self.out_norm = GroupNorm(channels)
        self.out_conv = zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], timesteps [B] (float), labels [B], low_res [B, C, h, w] -> [B, out_channels, H, W]."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.channels))  # [B, 4C]
        if self.class_embed is not None:
            assert labels is not None, "a class-conditional network needs labels"
            emb = emb + self.class_embed(labels)
        emb = F.silu(emb)
        if self.config.low_res_size:
            assert low_res is not None, "a super-resolution network needs the low-resolution images"
            upsampled = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, upsampled.to(x.dtype)], dim=1)

        h = self.stem(x)
        skips = [h]
        for step in self.encoder:
            h = step(h, emb) if isinstance(step, UNetBlock) else step(h)
            skips.append(h)
        for step in self.middle:
            h = step(h, emb)
        for step in self.decoder:
            h = step(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(step, UNetBlock) else step(h)
        out: Tensor = self.out_conv(F.silu(self.out_norm(h)))
        return out.float()
