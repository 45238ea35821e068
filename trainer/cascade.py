"""Images from a cascade of networks, of any number, in which each enlarges what the one before it made.

A stage that was trained with noise on the images it enlarges is given them with noise (Ho et al. 2021, section 4):

- non-truncated: the stage below makes its images completely, in 8 bits, and they are noised to step s.
- truncated: the stage below ends at its step s, and its z_s goes on as it is, neither finished nor rounded.

Every stage has an s and a way of its own (`SamplingConfig.low_res_noise` and `augmentation`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, UserError
from trainer.config.diffusion import DiffusionConfig
from trainer.config.run import RunConfig
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.samplers import to_uint8
from trainer.sampling import (
    Progress,
    Stage,
    check_labels,
    check_low_res_noise,
    draw,
    no_progress,
    noisy_low_res,
    num_calls,
)


def sample_cascade(
    stages: Sequence[Stage],
    seeds: Sequence[int],
    *,
    base: Tensor | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> list[Tensor]:
    """The images of every stage, uint8 [n, C, H, W]: each stage enlarges those of the stage before.

    The first stage starts from noise, or enlarges `base`, uint8 [n, C, h, w], as if a stage before had made it.
    Between stages images are rounded to 8 bits: so the stages may as well run one by one, with files between them.
    The exception is a stage that is truncated by the next: its images here are its z_s, noise and all, rounded for
    looking at. (The same stages without the next one finish these images, where the sampler takes one step at a time.)

    Raises UserError for stages that do not fit together, and for classes that one does not know.
    """
    configs, samplings = [stage.config for stage in stages], [stage.sampling for stage in stages]
    check_cascade(configs, base_size=0 if base is None else base.shape[-1], labels=labels)
    check_augmentation(configs, samplings, has_base=base is not None)
    images = [] if base is None else [base]
    truncated: tuple[Tensor, int] | None = None  # z_s and s of the stage before
    for stage, stop in zip(stages, stops(samplings), strict=True):
        number, step, low_res = len(images), stage.sampling.low_res_noise, None
        if truncated is not None:
            low_res, step = truncated
        elif images:
            x0 = images[-1].float() / 127.5 - 1
            low_res = noisy_low_res(stage, seeds, x0, seed=seed, stage_number=number, device=device)
        x = draw(
            stage, seeds, labels=labels, low_res=low_res, low_res_step=step, stop=stop, seed=seed, stage_number=number,
            device=device, progress=progress,
        )  # fmt: skip
        images.append(to_uint8(x).cpu())
        truncated = (x, step_reached(stage.config.diffusion, stage.sampling, stop)) if stop else None
    return images if base is None else images[1:]


def stops(samplings: Sequence[SamplingConfig]) -> list[int]:
    """The step at which each stage ends: that of the next one's s where it is truncated, else 0, its image."""
    return [s.low_res_noise if s.augmentation == "truncated" else 0 for s in samplings[1:]] + [0]


def step_reached(diffusion: DiffusionConfig, sampling: SamplingConfig, stop: int) -> int:
    """The step of the whole process at which a stage with this `stop` > 0 ends: the last visited one not below it.

    Raises ConfigError where none is.
    """
    schedule = GaussianDiffusion.create(diffusion, respacing=sampling.respacing).schedule
    return int(schedule.timestep_map[schedule.last_step(stop)])


def steps_reached(configs: Sequence[RunConfig], samplings: Sequence[SamplingConfig]) -> list[int | None]:
    """For each stage the step at which the one below it ends, and which it is told; None where it does not truncate.

    Raises ConfigError as `step_reached`.
    """
    ends = [
        step_reached(config.diffusion, sampling, stop) if stop else None
        for config, sampling, stop in zip(configs, samplings, stops(samplings), strict=True)
    ]
    return [None, *ends[:-1]]


def total_calls(stages: Sequence[Stage]) -> int:
    """Network calls a sample, of all stages."""
    ends = stops([stage.sampling for stage in stages])
    return sum(
        num_calls(stage.config.diffusion, stage.sampling, stop=stop) for stage, stop in zip(stages, ends, strict=True)
    )


def check_cascade(configs: Sequence[RunConfig], *, base_size: int = 0, labels: Sequence[int] | None = None) -> None:
    """Raises UserError unless each network enlarges what those before it make, and all know the classes `labels`.

    `base_size`: of the images that the first is given, 0 for none.
    """
    size, classes = base_size, 0
    for number, config in enumerate(configs, start=1):
        model = config.model
        if config.is_classifier:
            raise UserError(
                f"stage {number} ({config.name}) is a classifier, which makes no images; let it guide a network's, "
                "with --classifier."
            )
        if model.low_res_size != size:
            needs = f"{model.low_res_size} px images to enlarge" if model.low_res_size else "no images to start from"
            given = f"{size} px images" if size else "none"
            raise UserError(f"stage {number} ({config.name}) takes {needs}, but is given {given}; mind the order.")
        if model.num_classes and classes and model.num_classes != classes:
            raise UserError(f"stage {number} ({config.name}) knows {model.num_classes} classes, one before {classes}.")
        check_labels(config, labels or ())
        size, classes = model.image_size, model.num_classes or classes


def check_augmentation(
    configs: Sequence[RunConfig], samplings: Sequence[SamplingConfig], *, has_base: bool = False
) -> None:
    """Raises UserError for noise between stages that the upper one was not trained with, or the lower cannot give.

    `has_base`: the first stage enlarges finished images.
    """
    for number, (config, sampling) in enumerate(zip(configs, samplings, strict=True), start=1):
        try:
            check_low_res_noise(config, sampling)
        except UserError as error:
            raise UserError(f"stage {number}: {error}") from None
        if sampling.augmentation != "truncated":
            continue
        if number == 1:
            given = "the images given as base are finished" if has_base else "there is none"
            raise UserError(
                f"stage 1 ({config.name}): augmentation=truncated ends the stage below early, but {given}; use "
                "augmentation=non_truncated."
            )
        _check_truncation(number, configs[number - 2], samplings[number - 2], config, sampling)


def _check_truncation(
    number: int, below: RunConfig, below_sampling: SamplingConfig, config: RunConfig, sampling: SamplingConfig
) -> None:
    """Raises UserError unless the stage below has a z_s of the kind that stage `number` was trained on."""
    told, own, noise = config.low_res_process, below.diffusion, config.model.low_res_noise
    assert told is not None
    assert noise is not None
    names = ("num_timesteps", "schedule", "schedule_shape")
    kinds = [" ".join(str(getattr(process, name)) for name in names) for process in (own, told)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"stage {number} ({config.name}): augmentation=truncated, but {below.name} has the process {kinds[0]} and "
            f"{config.name} was trained on noise of {kinds[1]} (model.low_res_noise); use augmentation=non_truncated."
        )
    try:
        step = step_reached(own, below_sampling, sampling.low_res_noise)
    except ConfigError as error:
        raise UserError(f"stage {number} ({config.name}): low_res_noise={sampling.low_res_noise}: {error}") from None
    if step > noise.max_step:
        raise UserError(
            f"stage {number} ({config.name}): low_res_noise={sampling.low_res_noise}: with respacing="
            f"{below_sampling.respacing} the first step that {below.name} visits from there on is {step}, and "
            f"{config.name} was trained with steps up to {noise.max_step}; lower low_res_noise, or give {below.name} "
            "more steps."
        )
