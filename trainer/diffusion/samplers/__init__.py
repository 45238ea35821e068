"""The samplers by name, one family a file."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.samplers.ancestral import ancestral
from trainer.diffusion.samplers.ddim import ddim
from trainer.diffusion.samplers.sampler import Sampler

SAMPLERS: dict[str, Sampler] = {"ancestral": Sampler(ancestral), "ddim": Sampler(ddim, options=("eta",))}


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 256 grey levels: uint8, same shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
