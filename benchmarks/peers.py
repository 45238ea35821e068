"""The same network as others have written it: peers of a benchmark, built to the structure of a `ModelConfig`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.config.model import UNetConfig

INSTALL_DIFFUSERS = "pip install -e '.[bench]'"


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel with our widths, depths, attention resolutions and scale-shift time conditioning.

    It has one width a head where ours has a number of heads: the deepest level's is used. Raises UserError when
    diffusers is not installed.
    """

    def __init__(self, config: UNetConfig, *, out_channels: int) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise UserError(
                f"the peer needs diffusers, which cannot be imported ({error}); "
                f"install it with: {INSTALL_DIFFUSERS}, or leave it out: --peers none"
            ) from error
        widths = config.widths
        attends = [config.image_size // 2**level in config.attention_resolutions for level in range(len(widths))]
        self.unet = UNet2DModel(
            sample_size=config.image_size,
            in_channels=3,
            out_channels=out_channels,
            block_out_channels=widths,
            layers_per_block=config.num_res_blocks,
            down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
            up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
            attention_head_dim=widths[-1] // config.num_heads,
            norm_num_groups=math.gcd(32, *widths),
            norm_eps=1e-5,
            dropout=config.dropout,
            resnet_time_scale_shift="scale_shift" if config.use_scale_shift_norm else "default",
        )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x [B, 3, H, W], timesteps [B] -> [B, out_channels, H, W]."""
        output: Tensor = self.unet(x, timesteps, return_dict=False)[0]
        return output


def improved_diffusion_unet(config: UNetConfig, *, out_channels: int, path: Path) -> nn.Module:
    """The reference code's UNet from a checkout of openai/improved-diffusion.

    Raises UserError when `path` is not one.
    """
    if not (path / "improved_diffusion" / "unet.py").exists():
        raise UserError(f"--peer-path {path} is no checkout of improved-diffusion (no improved_diffusion/unet.py).")
    sys.path.append(str(path))
    from improved_diffusion.unet import UNetModel

    settings: dict[str, Any] = {
        "in_channels": 3,
        "model_channels": config.channels,
        "out_channels": out_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": tuple(config.image_size // size for size in config.attention_resolutions),
        "dropout": config.dropout,
        "channel_mult": config.channel_mult,
        "num_heads": config.num_heads,
        "use_scale_shift_norm": config.use_scale_shift_norm,
    }
    network: nn.Module = UNetModel(**settings)
    return network
