"""The study file: what is trained, how large, how long, where it is evaluated.

Read, merged and checked like a run's config (`base:` inherits from another study file, `key=value` overrides); whatever
is unknown or impossible is refused with the key's path, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from cluster.definition.ladder import OF_THE_STUDY, Ladder
from data_pipeline.errors import ConfigError
from trainer.config.sampling import SamplingConfig
from trainer.config.section import Place, Section
from trainer.config.tree import laid_over, merge, parse_overrides, read_tree, validate
from trainer.mirror_store import shown, url_problem


class ExtraTrial(Section):
    """A trial beside the ladder, such as a stage of a cascade. It is trained and evaluated, never fitted."""

    name: str = Field(pattern=r"^[\w.-]+$")
    run: Path  # its config file
    settings: dict[str, Any] = Field(default={})  # section.key -> value
    budget_images: int | None = Field(default=None, ge=1)  # default: the study's budget
    evaluate: bool = True


class Budget(Section):
    """How long each trial trains: one of the two, the same for all."""

    flops: float | None = Field(
        default=None, gt=0, allow_inf_nan=False
    )  # training FLOPs: curves of all sizes end at the same compute
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

    @model_validator(mode="after")
    def _nothing_is_enlarged(self) -> DistanceConfig:
        if self.low_res_noise:
            raise ValueError(
                f"evaluation.distance.low_res_noise={self.low_res_noise} is noise on images that a network enlarges, "
                "and those that are measured enlarge none; leave it out (cascades: python -m evaluation.sample)"
            )
        return self

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{name: getattr(self, name) for name in SamplingConfig.model_fields})


class EvaluationConfig(Section):
    test: Place = Field(description="folder or URL of the held-out split's shards")
    num_points: int = Field(default=8, ge=1, le=1000)  # log-spaced from min_images to the budget
    min_images: int = Field(default=512, ge=1)
    images: tuple[int, ...] | None = None  # or these very points, and the budget
    flops: tuple[FiniteFloat, ...] | None = None  # or where all sizes have had so much compute, and the budget
    nll: NllConfig | None = NllConfig()
    distance: DistanceConfig | None = None
    weights: str = "ema"  # which are measured: an average that the trials track, such as power_0.1, or model, the bare
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _points_are_positive(self) -> EvaluationConfig:
        for name, points in (("images", self.images), ("flops", self.flops)):
            for point in points or ():
                if not point > 0:
                    raise ValueError(f"evaluation.{name}={list(points or ())}: {point:g} is before the first step")
        return self


class ResourcesConfig(Section):
    """What one trial and one evaluation take."""

    num_processes: int = Field(default=1, ge=1)  # of a trial
    num_nodes: int = Field(default=1, ge=1)  # that share them evenly
    cpus: float = Field(default=1, gt=0)  # of a trial, on all of its nodes together
    gpus: int = Field(default=0, ge=0)  # likewise: one a process, or none
    min_processes: int | None = Field(default=None, ge=1)  # may go on with so few where devices were lost; default: all
    eval_cpus: float = Field(default=1, gt=0)
    eval_gpus: int = Field(default=0, ge=0)
    eval_shards: int = Field(default=1, ge=1)  # processes that share one evaluation, each with eval_cpus and eval_gpus
    eval_share: float = Field(default=0.25, ge=0, le=1)  # of the devices, for evaluations while trials wait; one always
    shrink_after: float = Field(default=120.0, ge=0)  # seconds that lost devices have to come back, for min_processes

    @model_validator(mode="after")
    def _one_device_a_process(self) -> ResourcesConfig:
        if self.gpus and self.gpus != self.num_processes:
            raise ValueError(
                f"resources.gpus={self.gpus} with resources.num_processes={self.num_processes}: "
                "each process drives one GPU, so set both to the same number"
            )
        return self

    @model_validator(mode="after")
    def _processes_are_shared_evenly(self) -> ResourcesConfig:
        divisors = [n for n in range(1, self.num_processes + 1) if self.num_processes % n == 0]
        for name, value in (("num_nodes", self.num_nodes), ("min_processes", self.min_processes)):
            if value is not None and value not in divisors:
                raise ValueError(
                    f"resources.{name}={value} does not divide resources.num_processes={self.num_processes}; "
                    f"use one of {divisors}"
                )
        return self


class DeviceConfig(Section):
    """What `plan` reckons time with."""

    name: str = "CPU core"
    peak_flops: float = Field(default=1e11, gt=0)  # FLOP/s of one device
    utilization: float = Field(default=0.3, gt=0, le=1)
    memory_gb: float | None = Field(default=None, gt=0)  # of one device, in 1e9 bytes; default: not checked
    count: int | None = Field(default=None, ge=1)  # devices of the cluster, where there is no `cluster:` section


class ClusterConfig(Section):
    """The cluster: what `plan` simulates on, and what one that grows may grow to."""

    nodes: int = Field(ge=1)  # alike; with autoscale the most there can be
    cpus: float = Field(gt=0)  # of one node
    gpus: float = Field(default=0, ge=0)  # of one node
    autoscale: bool = False  # nodes come when they are asked for: wait for them where they are not there yet
    allow_skew: bool = False  # let driver and workers have different versions of the code or its libraries


class EarlyStop(Section):
    """When a trial has diverged: all errors of a window are so many times the lowest median of a window before."""

    loss_factor: float = Field(default=4.0, gt=1)  # of train/mse
    window: int = Field(default=10, ge=1)  # training records, one every train.log_every_images


class RetryConfig(Section):
    """What happens when a job fails through no fault of its own."""

    attempts: int = Field(default=5, ge=1)  # in all, without progress in between
    losses: int = Field(default=20, ge=0)  # of workers or nodes, a job
    first_pause: float = Field(default=5.0, ge=0)  # seconds; doubled each time, ...
    longest_pause: float = Field(default=300.0, ge=0)  # ... up to this
    disk_wait: float = Field(default=86400.0, ge=0)  # seconds in all that a job waits for space on a full disk

    @model_validator(mode="after")
    def _pauses_grow(self) -> RetryConfig:
        if self.longest_pause < self.first_pause:
            raise ValueError(
                f"retry.longest_pause={self.longest_pause:g} is shorter than retry.first_pause={self.first_pause:g}; "
                "raise the one or lower the other"
            )
        return self


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
    priorities: dict[str, int] = Field(default={})  # pattern of trial names -> higher first; the last that matches
    device: DeviceConfig = DeviceConfig()
    cluster: ClusterConfig | None = None
    early_stop: EarlyStop | None = EarlyStop()
    retry: RetryConfig = RetryConfig()
    mirror: Place | None = None  # URL, such as s3://BUCKET/FOLDER, of a copy of the study's folder in object storage
    tracking: StudyTracking = StudyTracking()

    @model_validator(mode="after")
    def _no_double_seeds(self) -> StudyConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice")
        return self

    @model_validator(mode="after")
    def _settings_count(self) -> StudyConfig:
        for key, owner in OF_THE_STUDY.items():
            part: Any = nest(self.settings)
            for name in key.split("."):
                part = part.get(name) if isinstance(part, dict) else None
            if part is not None:
                raise ValueError(f"settings: {key}={part!r} would be replaced by the study; use {owner}")
        return self

    @field_validator("mirror")
    @classmethod
    def _can_be_a_mirror(cls, value: str | None) -> str | None:
        problem = url_problem(value) if value is not None else None
        if problem:
            raise ValueError(f"mirror={shown(value or '')}: {problem}")
        return value


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML with its bases, apply `section.key=value` overrides, validate.

    Raises ConfigError naming file, key, value and remedy.
    """
    tree = merge(read_tree(path), parse_overrides(overrides))
    for mine, other in (("flops", "images"), ("images", "flops")):
        if any(o.startswith(f"budget.{mine}=") for o in overrides) and isinstance(tree.get("budget"), dict):
            tree["budget"].pop(other, None)
    folder = Path(path).resolve().parent
    study = validate(StudyConfig, _with_whole_paths(tree, folder), source=str(path))
    extra = tuple(trial.model_copy(update={"run": _beside(folder, trial.run)}) for trial in study.extra)
    return study.model_copy(update={"run": _beside(folder, study.run), "extra": extra})


def nest(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"model.channels": 64}` as `{"model": {"channels": 64}}`."""
    tree: dict[str, Any] = {}
    for dotted, value in settings.items():
        part: Any = value
        for name in reversed(dotted.split(".")):
            part = {name: part}
        tree = laid_over(tree, part)
    return tree


def _with_whole_paths(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`evaluation.distance.classifier` is relative to the study file; a study that is copied goes on naming it."""
    evaluation = tree.get("evaluation")
    distance = evaluation.get("distance") if isinstance(evaluation, dict) else None
    if isinstance(distance, dict) and isinstance(distance.get("classifier"), str):
        whole = str((folder / distance["classifier"]).resolve())
        return merge(tree, {"evaluation": {"distance": {"classifier": whole}}})
    return tree


def _beside(folder: Path, path: Path) -> Path:
    found = path if path.is_absolute() else (folder / path).resolve()
    if not found.is_file():
        raise ConfigError(f"run={path}: no such file ({found}); give a run's YAML file, relative to the study file.")
    return found
