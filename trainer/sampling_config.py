"""How a network is sampled from: what a config says of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from trainer.section import Section


def _text_of_number(value: Any) -> Any:
    """YAML reads `respacing: 50` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class SamplingConfig(Section):
    """How a network is sampled from."""

    sampler: Literal["ancestral", "ddim"] = "ddim"
    # Steps of the process that are visited: "100", "10,15,20", "ddim50" (by a fixed stride) or "quadratic50".
    respacing: Annotated[str, BeforeValidator(_text_of_number)] = "50"
    eta: float = Field(0.0, ge=0, le=1)  # noise of ddim; 0: none
    # Classifier-free guidance: eps_null + guidance * (eps_class - eps_null), for networks that know a null class.
    guidance: float = Field(1.0, ge=0, allow_inf_nan=False)

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
    def _eta_is_heard(self) -> SamplingConfig:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta} is for sampler=ddim, but sampler={self.sampler}; leave it out")
        return self
