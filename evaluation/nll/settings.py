"""What is asked of a likelihood estimate: all that its value depends on, beside data, weights and seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.errors import UserError

Mode = Literal["importance", "uniform", "exact"]
MIN_CALLS = 128  # eight replicates of sixteen calls: fewer say nothing with an error bar
MAX_CALLS = 10_000_000  # of a sampled estimate, whose calls are all kept: a gigabyte


@dataclass(frozen=True)
class NllSettings:
    """How the bound is looked at."""

    mode: Mode = "importance"
    num_calls: int = 2048  # network calls (importance, uniform): the budget; the pilot's come on top and are counted
    target_stderr: float | None = None  # bits/dim: stop as soon as the standard error is this small
    num_images: int | None = None  # exact mode: images swept over all steps; None: all of the split
    respacing: str | None = None  # the chain whose bound it is: None the full one, or such as "100", "ddim50"
    clip_denoised: bool = True  # bound every predicted x_0 to [-1, 1]

    def check(self, num_images: int | None = None) -> None:
        """Raises UserError for what gives no estimate; `num_images`: how many the split has, where that is known."""
        if self.mode not in get_args(Mode):
            raise UserError(f"--mode {self.mode}: known are {', '.join(get_args(Mode))}.")
        if self.mode != "exact" and self.num_calls < MIN_CALLS:
            raise UserError(
                f"--num-calls {self.num_calls} is too few for an estimate with an error bar; use {MIN_CALLS} or more."
            )
        if self.mode != "exact" and self.num_calls > MAX_CALLS:
            raise UserError(
                f"--num-calls {self.num_calls} is too many, {MAX_CALLS:,} the most: it would be far surer than any "
                "comparison needs. --mode exact looks at every timestep of every image."
            )
        if self.mode != "exact" and self.num_images is not None:
            raise UserError(
                f"--num-images {self.num_images}: --mode {self.mode} draws its images as it needs them; --num-calls is "
                "its size, or use --mode exact."
            )
        if self.target_stderr is not None and not (math.isfinite(self.target_stderr) and self.target_stderr > 0):
            raise UserError(f"--target-stderr {self.target_stderr:g}: bits/dim above 0 are expected, such as 0.01.")
        if self.target_stderr is not None and self.mode == "exact":
            raise UserError("--target-stderr: an exact sweep looks at everything once; use it with --mode importance.")
        if self.mode == "exact" and self.num_images is not None and self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} is too small; use 1 or more.")
        if self.mode == "exact" and num_images is not None and (self.num_images or 1) > num_images:
            raise UserError(
                f"--num-images {self.num_images}: the split has {num_images:,} images; ask for at most so many, or "
                "leave it out for all."
            )
