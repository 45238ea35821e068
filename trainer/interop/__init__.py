"""Weights of other code bases, in and out: formats by name."""

from __future__ import annotations

from trainer.interop import guided_diffusion, improved_diffusion
from trainer.interop.format import Format

FORMATS: dict[str, Format] = {"improved-diffusion": improved_diffusion, "guided-diffusion": guided_diffusion}
