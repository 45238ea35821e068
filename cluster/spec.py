"""The study file: what is trained, how large, how long, where it is evaluated.

Read, merged and checked like a run's config (`base:` inherits from another study file, `key=value` overrides); whatever
is unknown or impossible is refused with the key's path, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.errors import ConfigError
from trainer.config import Place, SamplingConfig, Section, merge, parse_overrides, read_tree, validate


class PowerRule(Section):
    """A setting that follows the ladder: value * (rung / at) ** power, such as lr = 1e-4 * (C / 128) ** -0.5."""

    value: float
    at: float = Field(gt=0)
    power: float


class Ladder(Section):
    """One trial a value and seed."""

    key: str = Field(min_length=1, description="config key that changes, such as model.channels")
    values: tuple[int | float, ...] = Field(min_length=1)
    label: str = "{key}={value}"  # how a size is called in tables and charts
    rules: dict[str, PowerRule] = Field(default={})  # config key -> how it follows the ladder

    @model_validator(mode="after")
    def _usable(self) -> Ladder:
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"ladder.values={list(self.values)} names a value twice; each rung is one size")
        if self.rules and any(value <= 0 for value in self.values):
            raise ValueError(f"ladder.values={list(self.values)}: rules are powers of the rung, which must be positive")
        try:
            self.label.format(key="", value=0)
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"ladder.label={self.label!r}: only {{key}} and {{value}} can stand in it") from None
        return self


class ExtraTrial(Section):
    """A trial beside the ladder, such as a stage of a cascade. It is trained and evaluated, never fitted."""

    name: str = Field(pattern=r"^[\w.-]+$")
    run: Path  # its config file
    settings: dict[str, Any] = Field(default={})  # section.key -> value
    budget_images: int | None = Field(default=None, ge=1)  # default: the study's budget
    evaluate: bool = True


class Budget(Section):
    """How long each trial trains: one of the two, the same for all."""

    flops: float | None = Field(default=None, gt=0)  # training FLOPs: curves of all sizes end at the same compute
    images: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.flops is None) == (self.images is None):
            raise ValueError(f"exactly one of budget.flops={self.flops} and budget.images={self.images} must be set")
        return self


class NllConfig(Section):
    splits: tuple[Literal["test", "train"], ...] = Field(default=("test", "train"), min_length=1)
    num_calls: int = Field(default=2048, ge=128)  # network calls an estimate
    train_num_calls: int | None = Field(default=None, ge=128)  # on training images; default: num_calls
    target_stderr: float | None = Field(default=None, gt=0)  # bits/dim: stop below the budget as soon as it is reached


class DistanceConfig(SamplingConfig):
    """Metrics of samples: distances in a feature net's space, and their kin; with Inception fd is the FID."""

    # fd, sfd, is, kd, precision, recall; memorisation (the training images nearest to a few samples)
    metrics: tuple[str, ...] = Field(default=("fd",), min_length=1)
    feature_net: str = "efflite0"
    feature_weights: Path | None = None  # the net's weights file; default: where it is kept, or downloaded
    split: Literal["test", "train"] = "test"  # the real images it is compared with
    num_samples: int = Field(ge=2)
    repeats: int = Field(default=1, ge=1)  # sets of samples; from two on there is a standard error
    batch: int = Field(default=64, ge=1)  # samples a network call
    num_reference: int | None = Field(default=None, ge=2)  # real images; default: the whole split
    reference: Path | None = None  # npz of published statistics to compare with instead
    points: Literal["last", "all"] = "last"  # at each trial's last point, or at all

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{name: getattr(self, name) for name in SamplingConfig.model_fields})


class EvaluationConfig(Section):
    test: Place = Field(description="folder or URL of the held-out split's shards")
    num_points: int = Field(default=8, ge=1, le=1000)  # log-spaced from min_images to the budget
    min_images: int = Field(default=512, ge=1)
    images: tuple[int, ...] | None = None  # or these very points, and the budget
    nll: NllConfig | None = NllConfig()
    distance: DistanceConfig | None = None
    seed: int = Field(default=0, ge=0)


class ResourcesConfig(Section):
    """What one trial and one evaluation take."""

    num_processes: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpus: int = Field(default=0, ge=0)
    eval_cpus: float = Field(default=1, gt=0)
    eval_gpus: int = Field(default=0, ge=0)
    eval_shards: int = Field(default=1, ge=1)  # processes that share one evaluation, each with eval_cpus and eval_gpus

    @model_validator(mode="after")
    def _one_device_a_process(self) -> ResourcesConfig:
        if self.gpus and self.gpus != self.num_processes:
            raise ValueError(
                f"resources.gpus={self.gpus} with resources.num_processes={self.num_processes}: "
                "each process drives one GPU, so set both to the same number"
            )
        return self


class DeviceConfig(Section):
    """What `plan` reckons time with."""

    name: str = "CPU core"
    peak_flops: float = Field(default=1e11, gt=0)  # FLOP/s of one device
    utilization: float = Field(default=0.3, gt=0, le=1)
    count: int | None = Field(default=None, ge=1)  # devices of the cluster; default: one trial's


class RetryConfig(Section):
    """What happens when a job fails through no fault of its own."""

    attempts: int = Field(default=3, ge=1)  # in all
    first_pause: float = Field(default=5.0, ge=0)  # seconds; doubled each time


class StudyTracking(Section):
    mlflow: bool = True
    uri: str | None = None  # default: MLFLOW_TRACKING_URI, else sqlite in runs/mlflow.db
    experiment: str | None = None  # default: the study's name


class StudyConfig(Section):
    """Everything that defines a study."""

    name: str = Field(pattern=r"^[\w.-]+$")
    run: Path = Field(description="config file that every trial starts from, relative to the study file")
    settings: dict[str, Any] = Field(default={})  # section.key -> value, for every trial
    ladder: Ladder
    extra: tuple[ExtraTrial, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    budget: Budget
    evaluation: EvaluationConfig
    resources: ResourcesConfig = ResourcesConfig()
    device: DeviceConfig = DeviceConfig()
    retry: RetryConfig = RetryConfig()
    tracking: StudyTracking = StudyTracking()

    @model_validator(mode="after")
    def _no_double_seeds(self) -> StudyConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice")
        return self


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML with its bases, apply `section.key=value` overrides, validate.

    Raises ConfigError naming file, key, value and remedy.
    """
    tree = merge(read_tree(path), parse_overrides(overrides))
    for mine, other in (("flops", "images"), ("images", "flops")):
        if any(o.startswith(f"budget.{mine}=") for o in overrides) and isinstance(tree.get("budget"), dict):
            tree["budget"].pop(other, None)
    study = validate(StudyConfig, tree, source=str(path))
    folder = Path(path).resolve().parent
    extra = tuple(trial.model_copy(update={"run": _beside(folder, trial.run)}) for trial in study.extra)
    return study.model_copy(update={"run": _beside(folder, study.run), "extra": extra})


def nest(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"model.channels": 64}` as `{"model": {"channels": 64}}`."""
    tree: dict[str, Any] = {}
    for dotted, value in settings.items():
        part: Any = value
        for name in reversed(dotted.split(".")):
            part = {name: part}
        tree = merge(tree, part)
    return tree


def _beside(folder: Path, path: Path) -> Path:
    found = path if path.is_absolute() else (folder / path).resolve()
    if not found.is_file():
        raise ConfigError(f"run={path}: no such file ({found}); give a run's YAML file, relative to the study file.")
    return found
