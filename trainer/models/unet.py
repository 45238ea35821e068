"""The UNet of Improved DDPM and ADM, unconditional, class-conditional or super-resolving."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model import UNetConfig
from trainer.models.blocks import GroupNorm, zeroed
from trainer.models.encoder import EncoderNetwork, UNetBlock


class UNet(EncoderNetwork):
    """Encoder, middle and decoder with skip connections from every encoder step to its decoder twin.

    The decoder has one block a level more than the encoder, since the encoder's first convolution and its
    downsamplings are skipped to as well.
    """

    def __init__(self, config: UNetConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__(
            config,
            in_channels=in_channels * (2 if config.low_res_size else 1),
            num_embeddings=config.num_classes + int(config.null_class),  # the last one: no class
        )
        skips = list(self.skip_channels)
        channels = skips[-1]
        self.decoder = nn.ModuleList()
        for level, (width, size) in reversed(list(enumerate(zip(config.widths, config.sizes, strict=True)))):
            for _ in range(config.num_res_blocks + 1):
                self.decoder.append(
                    self.block(channels + skips.pop(), width, attention=size in config.attention_resolutions)
                )
                channels = width
            if level > 0:
                self.decoder.append(self.resizing(channels, "up"))
        assert not skips

        self.out_norm = GroupNorm(channels)
        self.out_conv = zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(
        self, x: Tensor, timesteps: Tensor,
        labels: Tensor | None = None, low_res: Tensor | None = None, low_res_time: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, C, H, W], timesteps [B] (float), and conditions -> [B, out_channels, H, W] (float32).

        A label below 0 means "no class" (`model.null_class`).

        Raises ValueError for images that cannot be halved as often as the network has levels, and (on the CPU, where
        looking costs nothing) for labels below 0 without a null class.
        """
        emb = self.embed(timesteps, self.class_rows(labels), low_res_time)  # [B, 4C]
        h, skips = self.encode(self.beside_low_res(x, low_res), emb)
        for step in self.decoder:
            if isinstance(step, UNetBlock):
                h = self.run_block(step, emb, h, skips.pop())
            else:
                h = self.run_resizing(step, emb, h)
        out: Tensor = self.out_conv(F.silu(self.out_norm(h)))
        return out.float()
