"""The samplers by name, one family a file."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.samplers.ancestral import ancestral
from trainer.diffusion.samplers.ddim import ddim
from trainer.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s
from trainer.diffusion.samplers.ode import euler, heun, heun_calls
from trainer.diffusion.samplers.sampler import Sampler

SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(ancestral),
    "ddim": Sampler(ddim, options=("eta",)),
    "euler": Sampler(euler),
    "heun": Sampler(heun, solver_calls=heun_calls),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2s": Sampler(dpmpp_2s, stride=2),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde),
}


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 256 grey levels: uint8, same shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
