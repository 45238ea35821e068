"""The networks of improved-diffusion and guided-diffusion as functions of their weights.

Written from the papers and by the weights' names, to hold ours against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def random_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of these names and shapes, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@dataclass(frozen=True)
class Untold:
    """What names and shapes do not tell of a network."""

    heads: int = 4
    head_width: int | None = None  # takes the place of `heads`
    qkv_first: bool = False
    resizing: Mapping[str, Literal["down", "up"]] = field(default_factory=dict)  # residual blocks that resize, by name

    def heads_of(self, width: int) -> int:
        return width // self.head_width if self.head_width else self.heads


def their_function(
    w: Weights, x: Tensor, t: Tensor, untold: Untold, *, y: Tensor | None = None, low_res: Tensor | None = None
) -> Tensor:
    """A UNet's output [B, C or 2C, H, W]; of weights without a decoder a classifier's logits [B, K]."""
    emb = embedding(w, t, y)
    if low_res is not None:
        x = torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], 1)
    skips = []
    for number in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith("input_blocks."))):
        x = stage(w, f"input_blocks.{number}", x, emb, untold)
        skips.append(x)
    x = stage(w, "middle_block", x, emb, untold)
    if not any(key.startswith("output_blocks.") for key in w):
        return pooled(w, [*skips, x], untold)
    for number in range(len(skips)):
        x = stage(w, f"output_blocks.{number}", torch.cat([x, skips.pop()], 1), emb, untold)
    return conv2d(w, "out.2", F.silu(norm(w, "out.0", x)), padding=1)


def embedding(w: Weights, t: Tensor, y: Tensor | None) -> Tensor:
    channels = w["time_embed.0.weight"].shape[1]
    angles = t[:, None] * 10_000 ** (-torch.arange(channels // 2) / (channels // 2))
    emb = linear(w, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
    emb = linear(w, "time_embed.2", F.silu(emb))
    return emb if y is None else emb + w["label_emb.weight"][y]


def linear(w: Weights, name: str, h: Tensor) -> Tensor:
    return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])


def conv2d(w: Weights, name: str, h: Tensor, **kwargs: Any) -> Tensor:
    return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **kwargs)


def norm(w: Weights, name: str, h: Tensor) -> Tensor:
    return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"])


def doubled(h: Tensor) -> Tensor:
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(h: Tensor) -> Tensor:
    return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4


def res(w: Weights, name: str, h: Tensor, emb: Tensor, resize: str | None) -> Tensor:
    resized = {"up": doubled, "down": halved, None: lambda h: h}[resize]
    inner = conv2d(w, f"{name}.in_layers.2", resized(F.silu(norm(w, f"{name}.in_layers.0", h))), padding=1)
    e = linear(w, f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
    if e.shape[1] == 2 * inner.shape[1]:
        inner = norm(w, f"{name}.out_layers.0", inner) * (1 + e[:, : inner.shape[1]]) + e[:, inner.shape[1] :]
    else:
        inner = norm(w, f"{name}.out_layers.0", inner + e)
    h = resized(h)
    skip = conv2d(w, f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in w else h
    return skip + conv2d(w, f"{name}.out_layers.3", F.silu(inner), padding=1)


def attended(qkv: Tensor, heads: int, *, qkv_first: bool) -> Tensor:
    """[B, 3 C, N] -> [B, C, N]."""
    width = qkv.shape[1] // 3 // heads
    chunks = qkv.split(width, dim=1)  # of each head and each of its q, k and v
    out = []
    for head in range(heads):
        places = (head, heads + head, 2 * heads + head) if qkv_first else (3 * head, 3 * head + 1, 3 * head + 2)
        q, k, v = (chunks[place] for place in places)
        scores = torch.einsum("bci,bcj->bij", q, k) / width**0.5
        out.append(torch.einsum("bij,bcj->bci", scores.softmax(-1), v))
    return torch.cat(out, 1)


def attend(w: Weights, name: str, h: Tensor, untold: Untold) -> Tensor:
    flat = norm(w, f"{name}.norm", h).flatten(2)
    qkv = F.conv1d(flat, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
    out = attended(qkv, untold.heads_of(h.shape[1]), qkv_first=untold.qkv_first)
    return h + F.conv1d(out, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"]).reshape(h.shape)


def stage(w: Weights, name: str, h: Tensor, emb: Tensor, untold: Untold) -> Tensor:
    place = 0
    while any(key.startswith(f"{name}.{place}.") for key in w):
        part = f"{name}.{place}"
        if f"{part}.in_layers.2.weight" in w:
            h = res(w, part, h, emb, untold.resizing.get(part))
        elif f"{part}.qkv.weight" in w:
            h = attend(w, part, h, untold)
        elif f"{part}.op.weight" in w:
            h = conv2d(w, f"{part}.op", h, stride=2, padding=1)
        elif f"{part}.conv.weight" in w:
            h = conv2d(w, f"{part}.conv", doubled(h), padding=1)
        else:
            h = conv2d(w, part, h, padding=1)
        place += 1
    return h


def pooled(w: Weights, features: list[Tensor], untold: Untold) -> Tensor:
    """The four ways from feature maps to logits, told apart by their weights."""
    if "out.2.positional_embedding" in w:
        h = F.silu(norm(w, "out.0", features[-1])).flatten(2)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2) + w["out.2.positional_embedding"]
        qkv = F.conv1d(h, w["out.2.qkv_proj.weight"], w["out.2.qkv_proj.bias"])
        h = attended(qkv, untold.heads_of(h.shape[1]), qkv_first=True)
        return F.conv1d(h, w["out.2.c_proj.weight"], w["out.2.c_proj.bias"])[:, :, 0]
    if w["out.0.weight"].ndim == 1:
        h = F.silu(norm(w, "out.0", features[-1])).mean(dim=(2, 3), keepdim=True)
        return conv2d(w, "out.3", h).flatten(1)
    h = linear(w, "out.0", torch.cat([h.mean(dim=(2, 3)) for h in features], dim=1))
    if "out.1.weight" in w:
        return linear(w, "out.3", F.silu(norm(w, "out.1", h)))
    return linear(w, "out.2", F.relu(h))
