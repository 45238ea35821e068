"""The diffusion transformer with adaLN-Zero conditioning (Peebles & Xie 2023, section 3), on pixels or latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model import DiTConfig
from trainer.models.blocks import LowResTimeEmbedding, attend, timestep_embedding
from trainer.models.network import Network

TIME_CHANNELS = 256  # of the sinusoid, whatever the width
EPS = 1e-6  # of the layer norms
INIT_STD = 0.02  # of the embeddings of time and class


class DiT(Network[DiTConfig]):
    """Patches become tokens, blocks of attention and MLP transform them, and tokens become patches.

    Time and class act in every block through the scale, shift and gate of each residual branch. Gates start at zero,
    and so does the last layer: at first each block is the identity, and the network's output zero.
    """

    def __init__(self, config: DiTConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__(config)
        width, pixels = config.width, config.patch_size**2
        num_embeddings = config.num_classes + int(config.null_class)  # the last one: no class
        self.patch_embed = nn.Linear(in_channels * (2 if config.low_res_size else 1) * pixels, width)
        self.register_buffer("positions", position_embedding(config.grid_size, width), persistent=False)  # [N, width]
        self.time_embed = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embed = nn.Embedding(num_embeddings, width) if num_embeddings else None
        self.low_res_time_embed = LowResTimeEmbedding(TIME_CHANNELS, width) if config.low_res_noise else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, out_channels * pixels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("time_embed.", "class_embed.")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.startswith(("out_", "low_res_time_embed.proj.")) or ".modulation." in name:
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, timesteps: Tensor,
        labels: Tensor | None = None, low_res: Tensor | None = None, low_res_time: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, C, H, W], timesteps [B] (float), and conditions -> [B, out_channels, H, W] (float32).

        A label below 0 means "no class" (`model.null_class`).

        Raises ValueError for images of another size than `model.image_size`, and (on the CPU, where looking costs
        nothing) for labels below 0 without a null class.
        """
        size = self.config.image_size
        if x.shape[-2:] != (size, size):
            raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]}: this network was made for {size}x{size}")
        emb: Tensor = self.time_embed(timestep_embedding(timesteps, TIME_CHANNELS))  # [B, width]
        if self.class_embed is not None:
            emb = emb + self.class_embed(self.class_rows(labels))
        if self.low_res_time_embed is not None:
            emb = emb + self.low_res_time_embed(low_res_time)
        emb = F.silu(emb)
        tokens = patches(self.beside_low_res(x, low_res), self.config.patch_size)
        h = self.patch_embed(tokens) + self.positions  # [B, N, width], float32 also where products are not
        for block in self.blocks:
            h = self.run_block(block, h, emb)
        shift, scale = self.out_modulation(emb)[:, None].chunk(2, dim=-1)  # [B, 1, width]
        tokens = self.out_proj(modulated_norm(h, shift, scale))
        return image(tokens, self.config.patch_size).float()


class DiTBlock(nn.Module):
    """Attention and an MLP as residual branches; the embedding makes a shift, scale and gate of each."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = SelfAttention(width, num_heads=config.num_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width), nn.GELU(approximate="tanh"), nn.Linear(config.mlp_width, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, N, width], emb [B, width] (already through SiLU) -> [B, N, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=-1)  # [B, 1, width]
        x = x + gate1 * self.dropout(self.attention(modulated_norm(x, shift1, scale1)))
        out: Tensor = x + gate2 * self.dropout(self.mlp(modulated_norm(x, shift2, scale2)))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens."""

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        h = attend(*qkv.permute(2, 0, 3, 4, 1))  # [B, heads, d, N]
        projected: Tensor = self.proj(h.permute(0, 3, 1, 2).flatten(2))
        return projected


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then an image's own: x [B, N, width], shift and scale [B, 1, width]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def patches(x: Tensor, size: int) -> Tensor:
    """Square patches, row by row, as vectors of channels and pixels: [B, C, H, W] -> [B, N, C * size²]."""
    batch, channels, height, width = x.shape
    grid = x.reshape(batch, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size**2)


def image(tokens: Tensor, size: int) -> Tensor:
    """The inverse of `patches`, of a square image: [B, N, C * size²] -> [B, C, H, W]."""
    batch, num_tokens, length = tokens.shape
    side, channels = math.isqrt(num_tokens), length // size**2
    grid = tokens.reshape(batch, side, side, channels, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side * size, side * size)


def position_embedding(side: int, width: int) -> Tensor:
    """Fixed sinusoids of a square grid's positions, row by row: [side², width].

    The first half of a vector tells the column and the second the row, each by sines and then cosines of frequencies
    from 1 to 1 / 10000 (He et al. 2022 and Peebles & Xie 2023 after Vaswani et al. 2017).
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, width / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)  # [side², width / 2]
    return torch.cat([columns, rows], dim=1).float()
