"""A UNet's encoder and middle, with the time and class embedding: what the UNet and the classifier share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model import EncoderConfig
from trainer.models.blocks import (
    Attention,
    Downsample,
    LowResTimeEmbedding,
    ResBlock,
    Resize,
    Upsample,
    timestep_embedding,
)
from trainer.models.network import Network


class UNetBlock(nn.Module):
    """A ResBlock, with self-attention behind it at the resolutions that have it."""

    def __init__(self, res: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.res = res
        self.attention = attention

    def forward(self, emb: Tensor, *x: Tensor) -> Tensor:
        """emb [B, emb_channels], x: feature maps [B, .., H, W] joined by channels -> [B, out, H, W]."""
        h: Tensor = self.res(torch.cat(x, dim=1) if len(x) > 1 else x[0], emb)
        return h if self.attention is None else self.attention(h)


class EncoderNetwork(Network[EncoderConfig]):
    """The embedding of time and class, the levels of the encoder, and the middle.

    `skip_channels` are the widths of what the encoder's steps put out, in their order.
    """

    def __init__(self, config: EncoderConfig, *, in_channels: int, num_embeddings: int = 0) -> None:
        super().__init__(config)
        self.emb_channels = 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, self.emb_channels), nn.SiLU(), nn.Linear(self.emb_channels, self.emb_channels)
        )
        self.class_embed = nn.Embedding(num_embeddings, self.emb_channels) if num_embeddings else None
        self.low_res_time_embed = (
            LowResTimeEmbedding(config.channels, self.emb_channels) if config.low_res_noise else None
        )

        channels = config.widths[0]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.skip_channels = [channels]
        self.encoder = nn.ModuleList()
        for level, (width, size) in enumerate(zip(config.widths, config.sizes, strict=True)):
            if level > 0:
                self.encoder.append(self.resizing(channels, "down"))
                self.skip_channels.append(channels)
            for _ in range(config.num_res_blocks):
                self.encoder.append(self.block(channels, width, attention=size in config.attention_resolutions))
                channels = width
                self.skip_channels.append(channels)
        self.middle = nn.ModuleList(self.block(channels, channels, attention=attention) for attention in (True, False))

    def block(self, in_channels: int, out_channels: int, *, attention: bool) -> UNetBlock:
        """A new block of the config's kind."""
        config = self.config
        res = self._res_block(in_channels, out_channels)
        if not attention:
            return UNetBlock(res, None)
        num_heads = config.heads_of(out_channels)
        order, rescale = config.attention_order, config.rescale_residuals
        return UNetBlock(res, Attention(out_channels, num_heads=num_heads, order=order, rescale=rescale))

    def resizing(self, channels: int, resize: Resize) -> nn.Module:
        """A new step between two levels, of the config's kind; `run_resizing` runs it."""
        if self.config.resblock_updown:
            return self._res_block(channels, channels, resize=resize)
        return Downsample(channels) if resize == "down" else Upsample(channels)

    def _res_block(self, in_channels: int, out_channels: int, *, resize: Resize | None = None) -> ResBlock:
        config = self.config
        return ResBlock(
            in_channels, out_channels, resize=resize, rescale=config.rescale_residuals,
            emb_channels=self.emb_channels, dropout=config.dropout, use_scale_shift_norm=config.use_scale_shift_norm,
        )  # fmt: skip

    def embed(self, timesteps: Tensor, rows: Tensor | None = None, low_res_time: Tensor | None = None) -> Tensor:
        """Timesteps [B], and what else the network is told, -> [B, emb_channels], through SiLU.

        rows: [B], of the class embedding; low_res_time: [B], as in `Conditions`.
        """
        emb: Tensor = self.time_embed(timestep_embedding(timesteps, self.config.channels))
        if self.class_embed is not None:
            emb = emb + self.class_embed(rows)
        if self.low_res_time_embed is not None:
            emb = emb + self.low_res_time_embed(low_res_time)
        return F.silu(emb)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B, in, H, W], emb [B, emb_channels] -> the middle's output, and those of the encoder's steps.

        Raises ValueError for images that cannot be halved as often as the network has levels.
        """
        halvings = len(self.config.widths) - 1
        if x.shape[-2] % 2**halvings or x.shape[-1] % 2**halvings:
            raise ValueError(
                f"images of {x.shape[-2]}x{x.shape[-1]} cannot pass {halvings + 1} levels: "
                f"height and width must be multiples of {2**halvings}"
            )
        h = self.stem(x)
        skips = [h]
        for step in self.encoder:
            h = self.run_block(step, emb, h) if isinstance(step, UNetBlock) else self.run_resizing(step, emb, h)
            skips.append(h)
        for step in self.middle:
            h = self.run_block(step, emb, h)
        return h, skips

    def run_resizing(self, step: nn.Module, emb: Tensor, h: Tensor) -> Tensor:
        """h [B, C, H, W] at half or twice the height and width."""
        if isinstance(step, ResBlock):
            return self.run_block(step, h, emb)
        resized: Tensor = step(h)
        return resized
