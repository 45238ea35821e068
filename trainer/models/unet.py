"""The UNet of Improved DDPM, unconditional, class-conditional or super-resolving."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.model_config import UNetConfig
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

    def forward(self, emb: Tensor, *x: Tensor) -> Tensor:
        """emb [B, emb_channels], x: feature maps [B, .., H, W] joined by channels -> [B, out, H, W]."""
        h: Tensor = self.res(torch.cat(x, dim=1) if len(x) > 1 else x[0], emb)
        return h if self.attention is None else self.attention(h)


class UNet(nn.Module):
    """Encoder, middle and decoder with skip connections from every encoder step to its decoder twin.

    The decoder has one block a level more than the encoder, since the encoder's first convolution and its
    downsamplings are skipped to as well.

    With `checkpoint_activations` a training step keeps the blocks' inputs only and computes the blocks again for the
    backward pass: less memory for one forward pass more, and the same gradients.
    """

    def __init__(self, config: UNetConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        emb_channels = 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        num_embeddings = config.num_classes + int(config.null_class)  # the last one: no class
        self.class_embed = nn.Embedding(num_embeddings, emb_channels) if num_embeddings else None

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
        """x [B, C, H, W], timesteps [B] (float), labels [B], low_res [B, C, h, w] -> [B, out_channels, H, W] (float32).

        A label below 0 means "no class" (`model.null_class`).

        Raises ValueError for images that cannot be halved as often as the network has levels, and (on the CPU, where
        looking costs nothing) for labels below 0 without a null class.
        """
        factor = 2 ** (len(self.config.channel_mult) - 1)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(
                f"images of {x.shape[-2]}x{x.shape[-1]} cannot pass {len(self.config.channel_mult)} levels: "
                f"height and width must be multiples of {factor}"
            )
        emb = self.time_embed(timestep_embedding(timesteps, self.config.channels))  # [B, 4C]
        if self.class_embed is not None:
            assert labels is not None, "a class-conditional network needs labels"
            emb = emb + self.class_embed(self._rows(labels))
        emb = F.silu(emb)
        if self.config.low_res_size:
            assert low_res is not None, "a super-resolution network needs the low-resolution images"
            upsampled = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, upsampled.to(x.dtype)], dim=1)

        h = self.stem(x)
        skips = [h]
        for step in self.encoder:
            h = self._run(step, emb, h) if isinstance(step, UNetBlock) else step(h)
            skips.append(h)
        for step in self.middle:
            h = self._run(step, emb, h)
        for step in self.decoder:
            h = self._run(step, emb, h, skips.pop()) if isinstance(step, UNetBlock) else step(h)
        out: Tensor = self.out_conv(F.silu(self.out_norm(h)))
        return out.float()

    def _rows(self, labels: Tensor) -> Tensor:
        """The class embedding's rows of labels: [B] -> [B]."""
        if self.config.null_class:
            return torch.where(labels < 0, self.config.num_classes, labels)
        if labels.device.type == "cpu" and bool((labels < 0).any()):
            raise ValueError(
                'labels below 0 mean "no class", which this network has none of; '
                "train with model.null_class=true, or give every image a class"
            )
        return labels

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A block's output; while training and if so asked, without what its backward pass needs."""
        if not (self.checkpoint_activations and self.training and torch.is_grad_enabled()):
            plain: Tensor = block(*inputs)
            return plain
        # The generator's state is kept only where a dropout mask has to be drawn again.
        output: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
        return output
