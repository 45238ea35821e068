"""What is asked of a likelihood estimate: all that its value depends on, beside data, weights and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["importance", "uniform", "exact"]


@dataclass(frozen=True)
class NllSettings:
    """How the bound is looked at."""

    mode: Mode = "importance"
    num_calls: int = 2048  # network calls (importance, uniform): the budget; the pilot's come on top and are counted
    target_stderr: float | None = None  # bits/dim: stop as soon as the standard error is this small
    num_images: int | None = None  # exact mode: images swept over all steps; None: all of the split
    respacing: str | None = None  # the chain whose bound it is: None the full one, or such as "100", "ddim50"
    clip_denoised: bool = True  # bound every predicted x_0 to [-1, 1]
