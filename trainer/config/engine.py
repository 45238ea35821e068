"""How a step is computed and spread over processes: what a config says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.section import Section


class EngineConfig(Section):
    """How a step is computed and spread over processes: part of the layout, not of the result."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    # Parameters, gradients and optimizer are float32 in all three; bf16 and fp16 are what the network computes in.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: float = Field(65536.0, gt=0)  # fp16: where it starts; halved when a gradient overflows, ...
    loss_scale_floor: float = Field(1.0, gt=0)  # ... never below this, ...
    loss_scale_window: int = Field(2000, ge=1)  # ... and doubled after this many steps without an overflow
    activation_checkpointing: bool = False  # less memory for one forward pass more: blocks are computed again backward
    offload_optimizer: bool = False  # master weights, moments and averages in the host's memory (ZeRO 1 to 3)
    compile: bool = False  # torch.compile: minutes at the start, fewer and larger kernels after it
    channels_last: bool = False  # activations as [B, H, W, C] in memory: what a GPU's convolutions like best
    overlap_comm: bool = True  # reduce gradients while the backward pass goes on (on a GPU, ZeRO 1 to 3)
    bucket_elements: int = Field(50_000_000, ge=1)  # gradients reduced in one message; memory 4 bytes each, twice
    deepspeed: dict[str, Any] = Field(default={})  # further DeepSpeed settings, or a JSON file of them
    num_cpu_threads: int | None = Field(None, ge=1)  # threads a process on the CPU; default: cores / processes
    peak_flops: float | None = Field(None, gt=0)  # a device's, for MFU; default: named for the GPU, measured on a CPU
    hang_seconds: float = Field(1800.0, ge=0)  # a job without a step for so long is ended; 0: never
    profile_steps: int = Field(0, ge=0)  # that many steps are traced into RUN/profile, soon after the start

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_json(cls, value: Any) -> Any:
        """The settings travel with the run, so a file is read here and its path forgotten."""
        if not isinstance(value, str | Path):
            return value
        try:
            tree = json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"engine.deepspeed={value}: no JSON file that can be read ({error})") from None
        if not isinstance(tree, dict):
            raise ValueError(f"engine.deepspeed={value}: the file must hold a JSON object of DeepSpeed's settings")
        return tree

    @model_validator(mode="after")
    def _fits(self) -> EngineConfig:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError(
                "engine.offload_optimizer=true needs partitioned optimizer state; set engine.zero_stage=1, 2 or 3"
            )
        if self.loss_scale < self.loss_scale_floor:
            raise ValueError(
                f"engine.loss_scale={self.loss_scale} starts below engine.loss_scale_floor={self.loss_scale_floor}; "
                "raise the one or lower the other"
            )
        return self
