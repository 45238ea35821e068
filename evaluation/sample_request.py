"""What `evaluation.sample` is asked to make, the key that names it, and the account of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_pipeline.files import sha256_file
from data_pipeline.manifest import SAMPLES, SourceInfo
from trainer.cascade import steps_reached
from trainer.config.sampling import SamplingConfig
from trainer.config.section import Section
from trainer.export import Export, Weights
from trainer.guiding import samples_said

# Keys of the sections `model` and `diffusion` that have been part of the images' keys from the start.
_ALWAYS_SAID = {
    "name", "image_size", "dropout", "num_classes", "null_class", "low_res_size", "channels", "channel_mult",
    "num_res_blocks", "attention_resolutions", "num_heads", "use_scale_shift_norm",
    "num_timesteps", "schedule", "prediction", "variance", "objective", "mse_target", "vlb_weight", "timestep_sampler",
    "rescale_timesteps",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be made."""

    exports: list[Export]
    samplings: list[SamplingConfig]
    weights: Weights
    numbers: range
    labels: list[int] | None  # [N]; None: nothing hears classes
    num_classes: int
    base: Tensor | None  # uint8 [N, 3, h, w]
    base_path: Path | None
    seed: int
    batch: int

    @property
    def image_size(self) -> int:
        return self.exports[-1].config.model.image_size

    def reached_steps(self) -> list[int | None]:
        """For each stage that truncates the one below it, the step at which that ends; None for the others."""
        return steps_reached([export.config for export in self.exports], self.samplings)

    def options(self) -> dict[str, str | int | float | bool]:
        """All that decides the images, as far as words go: equal options, equal images."""
        options: dict[str, str | int | float | bool] = {
            "seed": self.seed, "first": self.numbers.start, "num": len(self.numbers), "batch": self.batch,
        }  # fmt: skip
        if self.labels is not None:
            options["labels_sha256"] = hashlib.sha256(np.array(self.labels, dtype="<i8").tobytes()).hexdigest()
        if self.base_path is not None:
            options["base_sha256"] = sha256_file(self.base_path)
        for number, (export, sampling) in enumerate(zip(self.exports, self.samplings, strict=True), start=1):
            stage = {"weights_sha256": export.weights_sha256[self.weights], **samples_said(sampling)}
            options |= {f"stage{number}.{name}": value for name, value in stage.items()}
        return options

    def key(self, options: dict[str, Any]) -> str:
        """Names the images: of the options, and of the configs that say how the weights are to be read."""
        configs = [(_said(e.config.model), _said(e.config.diffusion)) for e in self.exports]
        return hashlib.sha256(json.dumps([options, configs], sort_keys=True).encode()).hexdigest()[:16]

    def account(self, options: dict[str, Any], key: str) -> dict[str, Any]:
        """What was made, of what, and how."""
        samplings = [s.model_dump(mode="json") for s in self.samplings]
        reached = self.reached_steps()
        return {
            "key": key,
            "first": self.numbers.start,
            "num": len(self.numbers),
            "seed": self.seed,
            "batch": self.batch,
            **{name: [s[name] for s in samplings] for name in samplings[0]},
            **({"reached_step": reached} if any(reached) else {}),
            "base": str(self.base_path) if self.base_path else None,
            "weights": self.weights,
            "exports": [
                {"path": str(e.path), "nimg": e.info["nimg"], "weights_sha256": e.weights_sha256[self.weights]}
                for e in self.exports
            ],
            "options": options,
        }

    def source(self, options: dict[str, Any]) -> SourceInfo:
        """What a manifest says of where the images came from."""
        return SourceInfo(kind=SAMPLES, options=options, origin=", ".join(str(e.path) for e in self.exports))


def _said(section: Section) -> dict[str, Any]:
    """A section of a config, without those later keys that are at their defaults: images of before keep their keys."""
    defaults = {name: field.default for name, field in type(section).model_fields.items()}
    return {k: v for k, v in section.model_dump().items() if k in _ALWAYS_SAID or getattr(section, k) != defaults[k]}
