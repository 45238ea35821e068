"""Two networks over time ranges (Nichol & Dhariwal 2021, appendix): each where it is the better one.

A network trained on L_vlb is better at small t, one trained on L_simple or L_hybrid elsewhere; together they have a
better bound than either. One network is asked per image, so the cost is that of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.config.run import RunConfig


@dataclass(frozen=True)
class Ensemble:
    """The other network, and where it takes over."""

    export: Path
    below: int  # it is asked at timesteps t < below of the whole process, the export's own at all others


class TimeRanges(nn.Module):
    """`low` at times below `boundary`, `high` at all others; called as either of them is."""

    def __init__(self, low: nn.Module, high: nn.Module, boundary: float) -> None:
        """`boundary`: a time as networks see it (rescaled, where the process does)."""
        super().__init__()
        self.low, self.high, self.boundary = low, high, boundary

    def forward(self, x: Tensor, time: Tensor, *conditions: Tensor | None) -> Tensor:
        """x [B, C, H, W], time [B], conditions [B, ...] -> [B, C or 2C, H, W]."""
        is_low = time < self.boundary
        rows = [(self.low, is_low.nonzero().flatten()), (self.high, (~is_low).nonzero().flatten())]
        parts = []
        for network, own in rows:
            if len(own):
                told = [None if value is None else value[own] for value in conditions]
                parts.append(network(x[own], time[own], *told))
        order = torch.argsort(torch.cat([own for _, own in rows]))
        return torch.cat(parts)[order]


def check_fit(own: RunConfig, other: RunConfig, below: int) -> None:
    """Raises UserError unless both networks answer the same question and `below` is inside the process."""
    size = ("image_size", "num_classes", "null_class", "low_res_size", "low_res_noise")
    process = (
        "num_timesteps", "schedule", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "prediction", "variance",
        "rescale_timesteps",
    )  # fmt: skip
    differing = [f"model.{name}" for name in size if getattr(own.model, name) != getattr(other.model, name)]
    differing += [
        f"diffusion.{name}" for name in process if getattr(own.diffusion, name) != getattr(other.diffusion, name)
    ]
    differing += ["model.name"] if own.is_classifier != other.is_classifier else []
    if differing:
        raise UserError(f"these two networks are no ensemble: they differ in {', '.join(differing)}.")
    if not 0 < below < own.diffusion.num_timesteps:
        raise UserError(
            f"--ensemble-below {below}: give a timestep between 1 and {own.diffusion.num_timesteps - 1}, the steps of "
            "the whole process, whatever the respacing."
        )
