"""A run is its config: one typed, validated tree.

YAML files may inherit (`base: other.yaml`, relative to the file); the command line overrides with
`section.key=value`. Whatever is unknown or impossible is refused here, with the key's path, the value and the
remedy, before anything starts. The resolved tree travels in every checkpoint and export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data_pipeline.errors import ConfigError
from trainer.config.data import DataConfig
from trainer.config.diffusion import DiffusionConfig
from trainer.config.engine import EngineConfig
from trainer.config.model import AnyModel, ClassifierConfig
from trainer.config.section import Place, Section
from trainer.config.train import TrainConfig
from trainer.config.tree import merge, parse_overrides, read_tree, validate
from trainer.diffusion.respacing import count_timesteps
from trainer.mirror_store import shown, url_problem


class TrackingConfig(Section):
    mlflow: bool = True  # a child process mirrors the run's records to MLflow
    uri: str | None = None  # default: MLFLOW_TRACKING_URI, else sqlite in runs/mlflow.db
    experiment: str = "runs"
    tags: dict[str, str] = Field(default={})


class FolderConfig(Section):
    folder: Path
    mirror: Place | None = None  # URL of a folder in object storage that gets a copy of it, see trainer/mirror.py

    @field_validator("mirror")
    @classmethod
    def _can_be_a_mirror(cls, value: str | None) -> str | None:
        problem = url_problem(value) if value is not None else None
        if problem:
            raise ValueError(f"run.mirror={shown(value or '')}: {problem}")
        return value


class RunConfig(Section):
    """Everything that defines a training run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**63)
    run: FolderConfig
    data: DataConfig
    model: AnyModel
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _old_grids_fit(cls, tree: Any) -> Any:
        """`num_steps`, the old key, meant that many steps or all there are."""
        try:
            grid, num_timesteps = tree["train"]["sample_grid"], tree.get("diffusion", {}).get("num_timesteps", 4000)
            if "num_steps" in grid and "respacing" not in grid:
                steps = min(int(grid["num_steps"]), int(num_timesteps))
                grid = {k: v for k, v in grid.items() if k != "num_steps"} | {"respacing": steps}
                return tree | {"train": tree["train"] | {"sample_grid": grid}}
        except (KeyError, TypeError, ValueError, AttributeError):
            pass  # no such tree: the fields' own errors say it better
        return tree

    @property
    def is_classifier(self) -> bool:
        """Whether the network says what class a noisy image has, instead of what image is in it."""
        return isinstance(self.model, ClassifierConfig)

    @property
    def low_res_process(self) -> DiffusionConfig | None:
        """The process whose steps say how noisy low-resolution images are; None where they have no noise."""
        noise = self.model.low_res_noise
        if noise is None:
            return None
        tree = self.diffusion.model_dump()
        tree |= {key: value for key in ("num_timesteps", "schedule") if (value := getattr(noise, key)) is not None}
        if tree["schedule"] != "sigmoid":
            tree = {key: value for key, value in tree.items() if not key.startswith("sigmoid_")}
        return DiffusionConfig.model_validate(tree)

    @model_validator(mode="after")
    def _low_res_noise_is_of_a_process(self) -> RunConfig:
        noise = self.model.low_res_noise
        try:
            process = self.low_res_process
        except ValidationError as error:
            raise ValueError(f"model.low_res_noise: {error.errors()[0]['ctx']['error']}") from None
        if noise is None or process is None:
            return self
        if noise.max_step >= process.num_timesteps:
            raise ValueError(
                f"model.low_res_noise.max_step={noise.max_step}: the process has {process.num_timesteps} steps; use 1 "
                f"to {process.num_timesteps - 1}, or set model.low_res_noise.num_timesteps to that of the stage below"
            )
        return self

    @model_validator(mode="after")
    def _network_fits_its_objective(self) -> RunConfig:
        objective, name = self.diffusion.objective, self.model.name
        if self.is_classifier and objective != "cross_entropy":
            raise ValueError(
                f"diffusion.objective={objective} is for networks that predict images, not for model.name=classifier; "
                "use diffusion.objective=cross_entropy"
            )
        if objective == "cross_entropy" and not self.is_classifier:
            raise ValueError(
                f"diffusion.objective=cross_entropy is for model.name=classifier, not for model.name={name}; "
                "use simple, hybrid or vlb"
            )
        return self

    @model_validator(mode="after")
    def _classifiers_make_no_images(self) -> RunConfig:
        train, num_images = self.train, self.train.sample_grid.num_images
        if self.is_classifier and num_images:
            raise ValueError(f"train.sample_grid.num_images={num_images}: a classifier makes no images; set it to 0")
        if self.is_classifier and train.class_dropout:
            raise ValueError(
                f"train.class_dropout={train.class_dropout}: a classifier learns from the labels; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _samples_can_be_made(self) -> RunConfig:
        grid = self.train.sample_grid
        if grid.num_images:
            try:
                count_timesteps(self.diffusion.num_timesteps, grid.respacing)
            except ConfigError as error:
                raise ValueError(f"train.sample_grid.{error}") from None
        return self

    @model_validator(mode="after")
    def _samples_enlarge_what_they_can(self) -> RunConfig:
        grid, noise = self.train.sample_grid, self.model.low_res_noise
        if grid.num_images and grid.low_res_noise > (noise.max_step if noise else 0):
            raise ValueError(
                f"train.sample_grid.low_res_noise={grid.low_res_noise}: the network is trained with steps up to "
                f"{noise.max_step if noise else 0} (model.low_res_noise.max_step); use 0 to that"
            )
        if grid.num_images and grid.augmentation == "truncated":
            raise ValueError(
                "train.sample_grid.augmentation=truncated ends a stage below early, and a grid has none: its small "
                "images are the data's; use augmentation=non_truncated"
            )
        return self

    @model_validator(mode="after")
    def _guidance_has_a_null_class(self) -> RunConfig:
        grid = self.train.sample_grid
        if grid.num_images and grid.guidance != 1 and not self.model.null_class:
            raise ValueError(
                f"train.sample_grid.guidance={grid.guidance:g} needs a class to be guided away from; set "
                "model.null_class=true and train.class_dropout, or guidance=1"
            )
        return self

    @model_validator(mode="after")
    def _dropped_labels_have_a_class(self) -> RunConfig:
        if self.train.class_dropout and not self.model.null_class:
            raise ValueError(
                f"train.class_dropout={self.train.class_dropout} needs a class for dropped labels; "
                "set model.null_class=true, or train.class_dropout=0"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML with its bases, apply `section.key=value` overrides, validate.

    Raises ConfigError naming file, key, value and remedy.
    """
    tree = read_tree(path)
    # A budget given on the command line replaces the file's, whichever of the two kinds it has.
    for key, other in (("budget_images", "budget_flops"), ("budget_flops", "budget_images")):
        if any(o.startswith(f"train.{key}=") for o in overrides):
            train = tree.get("train")
            if isinstance(train, dict):
                train.pop(other, None)
    return validate(RunConfig, merge(tree, parse_overrides(overrides)), source=str(path))
