"""How a network is sampled from: what a config says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from trainer.config.section import Section

SamplerName = Literal["ancestral", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2s", "dpmpp_2m_sde"]
ThresholdName = Literal["static", "dynamic", "none"]
# What records have always said of samples. Others are said where they are not the default: so that what was sampled
# before there were others has the records and keys that it had.
_ALWAYS_SAID = ("sampler", "respacing", "eta", "guidance")
_OF_A_CLASSIFIER = ("classifier", "classifier_scale", "classifier_weights")  # named by what it is: trainer/guiding.py


def _text_of_number(value: Any) -> Any:
    """YAML reads `respacing: 50` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class SamplingConfig(Section):
    """How a network is sampled from."""

    sampler: SamplerName = "ddim"  # trainer/diffusion/samplers/
    # Steps of the process that are visited: "100", "10,15,20", "ddim50", "quadratic50", "logsnr20" or "karras20"
    # (trainer/diffusion/respacing.py).
    respacing: Annotated[str, BeforeValidator(_text_of_number)] = "50"
    eta: float = Field(0.0, ge=0, le=1)  # noise of ddim; 0: none
    # Classifier-free guidance: eps_null + guidance * (eps_class - eps_null), for networks that know a null class.
    guidance: float = Field(1.0, ge=0, allow_inf_nan=False)
    # Classifier guidance: an export of a classifier, which adds classifier_scale * grad log p(y | x_t) to the score.
    classifier: Path | None = None
    classifier_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    classifier_weights: str = "ema"  # those of its export that are used
    # Every predicted x_0 is bounded to [-1, 1], by a quantile, or not at all (trainer/diffusion/thresholding.py).
    threshold: ThresholdName = "static"
    threshold_quantile: float | None = Field(None, gt=0, le=1)  # of dynamic, such as 0.995
    corrector_steps: int = Field(0, ge=0)  # Langevin steps wherever the sampler arrives
    corrector_snr: float | None = Field(None, gt=0, allow_inf_nan=False)  # of each such step; 0.16 is usual

    # How noisy the images are made that a super-resolution network enlarges: a step s of the stage below's process, for
    # networks with `model.low_res_noise`. And how that comes about: finished images are noised again, or the stage
    # below ends at its step s (trainer/cascade.py).
    low_res_noise: int = Field(0, ge=0)
    augmentation: Literal["non_truncated", "truncated"] = "non_truncated"

    def said(self) -> dict[str, Any]:
        """What a record says of how samples were made, and keys are made of, but for a classifier that guided."""
        fields = SamplingConfig.model_fields
        values = {name: getattr(self, name) for name in fields if name not in _OF_A_CLASSIFIER}
        return {k: v for k, v in values.items() if k in _ALWAYS_SAID or v != fields[k].default}

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, tree: Any) -> Any:
        """Runs and studies of before know `respacing` as `num_steps`."""
        if not isinstance(tree, dict) or "num_steps" not in tree:
            return tree
        if "respacing" in tree:
            raise ValueError(f"num_steps={tree['num_steps']}: this key is named respacing now; set that instead")
        return {k: v for k, v in tree.items() if k != "num_steps"} | {"respacing": tree["num_steps"]}

    @model_validator(mode="after")
    def _truncation_has_a_step(self) -> SamplingConfig:
        if self.augmentation == "truncated" and not self.low_res_noise:
            raise ValueError(
                "augmentation=truncated ends the stage below at step low_res_noise, which is 0: its image; set "
                "low_res_noise, or augmentation=non_truncated"
            )
        return self

    @model_validator(mode="after")
    def _eta_is_heard(self) -> SamplingConfig:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta} is for sampler=ddim, but sampler={self.sampler}; leave it out")
        return self

    @model_validator(mode="after")
    def _quantile_is_heard(self) -> SamplingConfig:
        if self.threshold == "dynamic" and self.threshold_quantile is None:
            raise ValueError("threshold=dynamic needs a threshold_quantile; set one, such as 0.995")
        if self.threshold != "dynamic" and self.threshold_quantile is not None:
            raise ValueError(
                f"threshold_quantile={self.threshold_quantile} is for threshold=dynamic, but "
                f"threshold={self.threshold}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _corrector_is_whole(self) -> SamplingConfig:
        if self.corrector_steps and self.corrector_snr is None:
            raise ValueError(
                f"corrector_steps={self.corrector_steps} needs a corrector_snr, the steps' size; set one, such as 0.16"
            )
        if self.corrector_snr is not None and not self.corrector_steps:
            raise ValueError(
                f"corrector_snr={self.corrector_snr} is for a corrector, but corrector_steps=0; set it, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _classifier_is_there(self) -> SamplingConfig:
        for name in ("classifier_scale", "classifier_weights"):
            value = getattr(self, name)
            if self.classifier is None and value != SamplingConfig.model_fields[name].default:
                raise ValueError(
                    f"{name}={value} is for a classifier, but none is set; set classifier, or leave it out"
                )
        return self
