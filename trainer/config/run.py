"""A run is its config: one typed, validated tree.

YAML files may inherit (`base: other.yaml`, relative to the file); the command line overrides with
`section.key=value`. Whatever is unknown or impossible is refused here, with the key's path, the value and the
remedy, before anything starts. The resolved tree travels in every checkpoint and export.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data_pipeline.errors import ConfigError
from data_pipeline.files import write_atomic
from trainer.averages.rules import SIGMA_REL_BOUND, DecayRule, Exponential, PowerProfile
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import NETWORK_CONFIGS, AnyModel, ClassifierConfig, ModelConfig
from trainer.config.sampling import SamplingConfig
from trainer.config.section import Place, Section
from trainer.diffusion.respacing import count_timesteps
from trainer.mirror_store import shown, url_problem


class RemoteConfig(Section):
    """Shards at a URL are read through a cache on the local disk, which all processes of a machine share."""

    cache: Path | None = None  # its folder; default: ~/.cache/diffusion-scaling/shards
    cache_gb: float = Field(64.0, gt=0)  # what it may hold; the least recently used shards go first
    patience: float = Field(120.0, gt=0)  # seconds without a byte, retries included, after which the run gives up
    connections: int = Field(4, ge=1, le=64)  # downloads at a time, a process


class DataConfig(Section):
    train: Place = Field(description="folder or URL of the training split's shards")
    random_flip: bool = True  # mirror half of the images, chosen by (seed, image number)
    shuffle_window: int = Field(1 << 18, ge=1)  # samples: how far one may move from its shard's place in the epoch
    num_threads: int = Field(1, ge=1, le=64)  # that decode one batch
    num_workers: int = Field(0, ge=0, le=64)  # processes that make batches; 0: a thread of the training process
    prefetch: int = Field(2, ge=1, le=64)  # batches kept ready ahead of the training step
    on_damage: Literal["error", "replace"] = "error"  # a damaged sample ends the run, or another takes its place
    max_damaged: int = Field(100, ge=1)  # damaged samples that a process replaces, from start to stop
    remote: RemoteConfig = RemoteConfig()


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


SectionT = TypeVar("SectionT", bound=Section)


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


def save_config(config: Section, path: Path) -> None:
    """Write the resolved tree as YAML, atomically."""
    write_atomic(path, to_yaml(config))


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_tree(path: Path, *, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over its `base:` (a path relative to the file), as a plain dict."""
    path = Path(path).resolve()
    if path in _seen:
        raise ConfigError(f"{path}: `base:` leads back to the file itself; remove the circle.")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}. The shipped ones are in configs/.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a YAML file in it.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(tree).__name__}.")
    sections = {str(key): value for key, value in tree.items()}
    base = sections.pop("base", None)
    if base is None:
        return sections
    return merge(read_tree(path.parent / str(base), _seen=(*_seen, path)), sections)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=1e-4", ...]` as a tree. Raises ConfigError for words that are not `key=value`."""
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"argument {word!r} is not of the form section.key=value, such as train.lr=1e-4.")
        try:
            part: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"argument {word!r} cannot be read: {error}") from None
        tree = laid_over(tree, part)
    return tree


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `under`: sections merge, values and lists are replaced.

    So is a model by one of another name, of which it keeps what all networks have.
    """
    old, new = under.get("model"), over.get("model")
    if isinstance(old, dict) and isinstance(new, dict) and new.get("name") not in (None, old.get("name", "unet")):
        under = under | {"model": {k: v for k, v in old.items() if k in ModelConfig.model_fields}}
    return laid_over(under, over)


def laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The same, of trees that are parts of one: of a model with another name everything is kept."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validate(schema: type[SectionT], tree: dict[str, Any], *, source: str) -> SectionT:
    """Build `schema` from a tree. Raises ConfigError listing every wrong key with its value and remedy."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(schema, dict(item)) for item in error.errors()]
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(schema: type[Section], item: dict[str, Any]) -> str:
    # Where a value may be of several kinds, pydantic adds the kind to the path: not a key of ours.
    location = [str(part) for part in item["loc"] if not str(part).startswith(("literal[", "constrained-"))]
    network = location.pop(1) if location[:1] == ["model"] and location[1:2] and location[1] in NETWORK_CONFIGS else ""
    path = ".".join(location)
    if item["type"] == "union_tag_invalid":
        return f"{path}.name={item['ctx']['tag']!r}: there is no such network; use {' or '.join(NETWORK_CONFIGS)}."
    if item["type"] == "extra_forbidden":
        known = _known_keys(schema, network, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}."
        return f"{path}={item['input']!r}: unknown key; {hint}"
    if item["type"] == "model_type":
        keys = ", ".join(_known_keys(schema, network, location))
        return f"{path}={item['input']!r}: a section is expected, not a value; its keys are {keys}."
    if item["type"] == "tuple_type":
        hint = f": {path}=[{item['input']}]" if isinstance(item["input"], int | float | str) else ""
        return f"{path}={item['input']!r}: a list is expected; write it in brackets, with commas between several{hint}."
    if item["type"] == "missing":
        return f"{path}: missing; set it in the file or as {path}=VALUE."
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])  # our own validators name key, value and remedy themselves ...
        # ... but those of a section with several places cannot know where it stands.
        return text if not location or f"{location[0]}." in text else f"{path}.{text}"
    return f"{path}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _known_keys(schema: type[BaseModel], network: str, location: list[str]) -> list[str]:
    """The keys of the section at `location`; below `model` those of the network that is named."""
    if network:
        schema, location = NETWORK_CONFIGS[network], location[1:]
    for part in location:
        field = schema.model_fields.get(part)
        inner = field.annotation if field else None
        models = [t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            return []
        schema = models[0]
    return sorted(schema.model_fields)
