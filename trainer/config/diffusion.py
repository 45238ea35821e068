"""The diffusion process and the objective: what a config says of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainer.config.section import Section

# What a network can predict, and what L_simple can be the squared error of.
Quantity = Literal["eps", "x0", "v", "previous_mean"]
ScheduleName = Literal["linear", "cosine", "sigmoid"]
Variance = Literal["learned_range", "learned", "fixed_small", "fixed_large"]
STEEPEST = 15.0  # end of a sigmoid, in its own units: beyond it float64 no longer tells neighbouring steps well apart
LEARNED: tuple[Variance, ...] = ("learned_range", "learned")  # those that are a second output of the network


class LowResNoiseConfig(Section):
    """Noise on the images that a super-resolution network enlarges (trainer/diffusion/low_res_noise.py).

    How noisy is said as a step s of the process of the stage below, which is the run's own where nothing is said.
    """

    max_step: int = Field(ge=1)  # training draws s from 0 (no noise) to this, uniformly; samples may have any of them
    num_timesteps: int | None = Field(None, ge=2)  # T of that process
    schedule: ScheduleName | None = None  # a sigmoid's shape is that of the run's own


class DiffusionConfig(Section):
    num_timesteps: int = Field(4000, ge=2)  # T
    schedule: ScheduleName = "cosine"
    sigmoid_start: float = Field(-3.0, allow_inf_nan=False)  # the sigmoid schedule's: alphas_cumprod falls from 1 to 0
    sigmoid_end: float = Field(3.0, allow_inf_nan=False)  # as a sigmoid does between these two, ...
    sigmoid_tau: float = Field(1.0, gt=0, allow_inf_nan=False)  # ... both divided by tau
    prediction: Quantity = "eps"  # what the network's output means (trainer/diffusion/gaussian.py)
    variance: Variance = "learned_range"
    objective: Literal["simple", "hybrid", "vlb", "cross_entropy"] = "hybrid"  # the last is a classifier's
    mse_target: Quantity | None = None  # L_simple is its squared error; default: what the network predicts
    loss_weight: Literal["none", "min_snr"] = "none"  # of L_simple at t; min_snr: min(SNR, gamma) of the x0-loss
    min_snr_gamma: float = Field(5.0, gt=0, allow_inf_nan=False)
    # L_hybrid = L_simple + weight * L_vlb [bits/dim]. rescaled: 1/1000; unrescaled: 1/T; or a number. The names are
    # the published code's two conventions, `rescale_learned_sigmas` on and off.
    vlb_weight: Literal["rescaled", "unrescaled"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "rescaled"
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment"] = "uniform"
    rescale_timesteps: bool = True  # the network sees t * 1000 / T

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second output, for the variance."""
        return self.variance in LEARNED and self.objective != "cross_entropy"

    @property
    def schedule_shape(self) -> dict[str, float]:
        """The schedule's own parameters."""
        if self.schedule != "sigmoid":
            return {}
        return {"start": self.sigmoid_start, "end": self.sigmoid_end, "tau": self.sigmoid_tau}

    @property
    def vlb_factor(self) -> float:
        """The weight of L_vlb in L_hybrid, as a number."""
        if self.vlb_weight == "rescaled":
            return 1 / 1000
        return 1 / self.num_timesteps if self.vlb_weight == "unrescaled" else float(self.vlb_weight)

    @field_validator("vlb_weight")
    @classmethod
    def _weight_has_its_name(cls, weight: str | float, info: ValidationInfo) -> str | float:
        """A number that has a name is known by it: runs made before there were names compare equal to later ones."""
        names = {1 / info.data.get("num_timesteps", 1): "unrescaled", 1 / 1000: "rescaled"}
        return names.get(weight, weight) if isinstance(weight, float) else weight

    @model_validator(mode="after")
    def _objective_fits(self) -> DiffusionConfig:
        if self.objective == "hybrid" and not self.learns_variance:
            raise ValueError(
                f"diffusion.objective=hybrid learns the variance, but diffusion.variance={self.variance}; "
                "use variance=learned_range or learned, or objective=simple"
            )
        if self.objective == "simple" and self.learns_variance:
            raise ValueError(
                f"diffusion.objective=simple gives diffusion.variance={self.variance} no gradient; "
                "use diffusion.variance=fixed_small or fixed_large, or objective=hybrid"
            )
        if self.objective == "vlb" and self.mse_target is not None:
            raise ValueError(
                f"diffusion.mse_target={self.mse_target} has no part in diffusion.objective=vlb; "
                "leave it out, or use objective=simple or hybrid"
            )
        if self.objective == "vlb" and self.loss_weight != "none":
            raise ValueError(
                f"diffusion.loss_weight={self.loss_weight} weighs L_simple, which diffusion.objective=vlb has none of; "
                "use loss_weight=none, or objective=simple or hybrid"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> DiffusionConfig:
        if self.schedule == "linear" and self.num_timesteps <= 20:
            raise ValueError(
                f"diffusion.num_timesteps={self.num_timesteps} is too few for the linear schedule (beta reaches 1); "
                "use more than 20, or schedule=cosine"
            )
        return self

    @model_validator(mode="after")
    def _classifiers_predict_no_image(self) -> DiffusionConfig:
        if self.objective != "cross_entropy":
            return self
        for name in ("prediction", "variance", "mse_target", "loss_weight", "vlb_weight"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"diffusion.{name}={value} says how an image is predicted, which a network with "
                    f"diffusion.objective=cross_entropy does not do; leave it out, or at {default or 'null'}"
                )
        if self.timestep_sampler == "loss_second_moment":
            raise ValueError(
                "diffusion.timestep_sampler=loss_second_moment draws by the terms of the bound, which "
                "diffusion.objective=cross_entropy has none of; use uniform or stratified"
            )
        return self

    @model_validator(mode="after")
    def _sigmoid_fits(self) -> DiffusionConfig:
        start, end, tau = self.sigmoid_start, self.sigmoid_end, self.sigmoid_tau
        if start >= end:
            raise ValueError(f"diffusion.sigmoid_start={start:g} must be below diffusion.sigmoid_end={end:g}")
        if max(abs(start), abs(end)) / tau > STEEPEST:
            raise ValueError(
                f"diffusion.sigmoid_tau={tau:g} makes the sigmoid from {start:g} to {end:g} so steep that its first or "
                f"last steps add no noise that could be told; use {max(abs(start), abs(end)) / STEEPEST:.2g} or more"
            )
        return self

    @model_validator(mode="after")
    def _parameters_count(self) -> DiffusionConfig:
        """A parameter of what is not chosen would be without effect."""
        for key, owner, value in (
            ("sigmoid_start", "schedule", "sigmoid"), ("sigmoid_end", "schedule", "sigmoid"),
            ("sigmoid_tau", "schedule", "sigmoid"), ("min_snr_gamma", "loss_weight", "min_snr"),
        ):  # fmt: skip
            given, default = getattr(self, key), type(self).model_fields[key].default
            if given != default and getattr(self, owner) != value:
                raise ValueError(
                    f"diffusion.{key}={given:g} has no effect with diffusion.{owner}={getattr(self, owner)}; "
                    f"use {owner}={value}, or leave it out"
                )
        return self
