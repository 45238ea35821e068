"""How a network is trained, and what is kept of it: what a config says of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.averages.rules import SIGMA_REL_BOUND, DecayRule, Exponential, PowerProfile
from trainer.config.sampling import SamplingConfig
from trainer.config.section import Section


class SampleGridConfig(SamplingConfig):
    """A PNG of samples beside every export."""

    num_images: int = Field(0, ge=0)  # 0: none


class TrainConfig(Section):
    global_batch: int = Field(ge=1)  # images a step, over all processes
    micro_batch: int | None = Field(None, ge=1)  # images a forward pass of one process; default: its whole share
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup_images: int = Field(0, ge=0)  # the learning rate rises linearly over these
    lr_decay: Literal["none", "linear"] = "none"  # linear: it falls to 0 at the end of the budget, warm-up apart
    class_dropout: float = Field(0.0, ge=0, lt=1)  # share of the labels replaced by the null class
    grad_clip: float = Field(0.0, ge=0)  # largest global gradient norm; 0: no clipping
    ema_decay: float = Field(0.9999, ge=0, lt=1)  # a step; the start uses min(ema_decay, (1 + step) / (10 + step))
    extra_ema_decays: tuple[float, ...] = ()  # further averages, kept and exported beside it
    ema_profiles: tuple[float, ...] = ()  # and power-function averages, by their sigma_rel: 0.05 and 0.1 for any other
    ema_snapshot_every_images: int | None = Field(None, ge=1)  # these kept for good, for `trainer.posthoc_ema`
    ema_snapshot_precision: Literal["fp32", "fp16"] = "fp32"  # that they are stored in
    max_skipped_steps: int = Field(20, ge=1)  # steps in a row without a finite gradient before the run gives up
    budget_images: int | None = Field(None, ge=1)  # stop after these many images ...
    budget_flops: float | None = Field(None, gt=0)  # ... or these many training FLOPs: one of the two
    log_every_images: int = Field(1024, ge=1)
    checkpoint_every_images: int | None = Field(None, ge=1)  # default: only at exports and at the end
    keep_checkpoints: int = Field(2, ge=1)  # the newest ones ...
    keep_every_images: int | None = Field(None, ge=1)  # ... and for good the first one from each multiple of this on
    export_images: tuple[int, ...] = ()  # images seen at which the model is exported; always at the end
    sample_grid: SampleGridConfig = SampleGridConfig()

    @property
    def averages(self) -> dict[str, DecayRule]:
        """Every average by the name it has in checkpoints and exports: "ema", "ema_0.999", "power_0.05"."""
        further: dict[str, DecayRule] = {f"ema_{decay:g}": Exponential(decay) for decay in self.extra_ema_decays}
        return {"ema": Exponential(self.ema_decay), **further, **self.profiles}

    @property
    def profiles(self) -> dict[str, PowerProfile]:
        """Those of power profiles: what a snapshot holds."""
        return {(profile := PowerProfile(sigma_rel)).name: profile for sigma_rel in self.ema_profiles}

    @model_validator(mode="after")
    def _one_budget(self) -> TrainConfig:
        if (self.budget_images is None) == (self.budget_flops is None):
            raise ValueError(
                f"exactly one of train.budget_images={self.budget_images} and train.budget_flops={self.budget_flops} "
                "must be set: it says when the run is finished (null unsets the other)"
            )
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(f"train.micro_batch={self.micro_batch} must divide train.global_batch={self.global_batch}")
        return self

    @model_validator(mode="after")
    def _averages_differ(self) -> TrainConfig:
        decays = (self.ema_decay, *self.extra_ema_decays)
        if (
            len({f"{decay:g}" for decay in self.extra_ema_decays}) < len(self.extra_ema_decays)
            or decays.count(self.ema_decay) > 1
            or any(not 0 <= decay < 1 for decay in decays)
        ):
            raise ValueError(
                f"train.extra_ema_decays={list(self.extra_ema_decays)}: give different numbers from 0 to below 1, "
                f"none of them train.ema_decay={self.ema_decay}"
            )
        return self

    @model_validator(mode="after")
    def _profiles_can_be(self) -> TrainConfig:
        lengths = self.ema_profiles
        if any(not 0 < sigma_rel < SIGMA_REL_BOUND for sigma_rel in lengths) or len(self.profiles) < len(lengths):
            raise ValueError(
                f"train.ema_profiles={list(lengths)}: give different relative lengths above 0 and below 1/sqrt(12) = "
                f"{SIGMA_REL_BOUND:.4f}, which is that of the uniform average of all of training; such as [0.05, 0.1]"
            )
        if self.ema_snapshot_every_images and not lengths:
            raise ValueError(
                f"train.ema_snapshot_every_images={self.ema_snapshot_every_images} keeps the averages of power "
                "profile, and there are none; set train.ema_profiles=[0.05,0.1], or leave it out"
            )
        return self
