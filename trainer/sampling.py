"""Images from trained networks: one network, or a cascade in which each enlarges what the one before it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.conditions import Conditions
from trainer.config import RunConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.guidance import NULL_LABEL, guided, num_calls_a_step
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS, to_uint8
from trainer.diffusion.samplers.langevin import langevin
from trainer.diffusion.samplers.sampler import Corrector, Noise
from trainer.diffusion.thresholding import Threshold, dynamic, static
from trainer.diffusion_config import DiffusionConfig
from trainer.models import IMAGE_CHANNELS
from trainer.sample_noise import SampleNoise
from trainer.sampling_config import SamplingConfig

Progress = Callable[[], object]  # called after every network call


def no_progress() -> None:
    """For whoever does not watch."""


@dataclass(frozen=True)
class Stage:
    """A network in evaluation mode, the config it was trained with, and how to sample from it."""

    network: nn.Module
    config: RunConfig
    sampling: SamplingConfig

    @property
    def num_calls(self) -> int:
        """Network calls a sample."""
        return num_calls(self.config.diffusion, self.sampling)


def num_calls(diffusion: DiffusionConfig, sampling: SamplingConfig) -> int:
    """Network calls a sample: those of the sampler, each of them two where it is guided."""
    schedule = GaussianDiffusion.create(diffusion, respacing=sampling.respacing).schedule
    calls = SAMPLERS[sampling.sampler].num_calls(schedule, corrector_steps=sampling.corrector_steps)
    return calls * num_calls_a_step(sampling.guidance)


def threshold_of(sampling: SamplingConfig) -> Threshold | None:
    """The bound on predicted x_0 that is asked for."""
    if sampling.threshold_quantile is not None:
        return dynamic(sampling.threshold_quantile)
    return static if sampling.threshold == "static" else None


def corrector_of(sampling: SamplingConfig) -> Corrector | None:
    """The corrector that is asked for."""
    if sampling.corrector_snr is None:
        return None
    return langevin(sampling.corrector_steps, sampling.corrector_snr)


def conditioned(network: nn.Module, conditions: Conditions) -> Denoiser:
    """The network as a function of (x_t, time) alone."""

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = network(x, time, *conditions)
        return output

    return denoise


def sample(
    stage: Stage,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    low_res: Tensor | None = None,
    seed: int = 0,
    stage_number: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> Tensor:
    """Samples number seeds[0], seeds[1], ... as uint8 [n, C, H, W], on the CPU.

    Sample i is a function of (seed, i, label): its noise bit for bit, its pixels up to the rounding that the
    network's batch size brings.

    Args:
        labels: [n] classes, -1 for none; by default sample i has class i modulo the number of classes.
        low_res: [n, C, h, w] in [-1, 1], what a super-resolution network is to enlarge.
        stage_number: place in a cascade; each has noise of its own.
        progress: called for every network call, after it.

    Raises UserError for classes that the network does not know, and for guidance that it cannot be given.
    """
    size = stage.config.model.image_size
    noise = SampleNoise(seeds, (IMAGE_CHANNELS, size, size), seed=seed, stage=stage_number, device=device)
    predictor = predictor_of(stage, seeds, labels=labels, low_res=low_res, device=device, progress=progress)
    return to_uint8(run_sampler(stage.sampling, predictor, noise(), noise)).cpu()


def predictor_of(
    stage: Stage,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    low_res: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> Predictor:
    """The stage's network on the process that is sampled along; arguments and errors as for `sample`."""
    diffusion = GaussianDiffusion.create(stage.config.diffusion, device, stage.sampling.respacing)
    classes = _classes(stage, seeds, labels)
    conditions = Conditions(None if classes is None else torch.tensor(classes), low_res)
    denoiser = _denoiser(stage, conditions.map(lambda value: value.to(device)))
    watched = _watched(denoiser, num_calls_a_step(stage.sampling.guidance), progress)
    return Predictor(watched, diffusion, threshold_of(stage.sampling))


def run_sampler(sampling: SamplingConfig, predictor: Predictor, x: Tensor, noise: Noise) -> Tensor:
    """From x at the first step of the predictor's process, [B, C, H, W], to x_0 by the sampler that was asked for."""
    sampler = SAMPLERS[sampling.sampler]
    options = {name: getattr(sampling, name) for name in sampler.options}
    return sampler(predictor, x, noise=noise, corrector=corrector_of(sampling), **options)


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
    Raises UserError for stages that do not fit together, and for classes that one does not know.
    """
    configs = [stage.config for stage in stages]
    check_cascade(configs, base_size=0 if base is None else base.shape[-1], labels=labels)
    images = [] if base is None else [base]
    for stage in stages:
        low_res = images[-1].float() / 127.5 - 1 if images else None
        made = sample(
            stage, seeds, labels=labels, low_res=low_res, seed=seed, stage_number=len(images), device=device,
            progress=progress,
        )  # fmt: skip
        images.append(made)
    return images if base is None else images[1:]


def check_cascade(configs: Sequence[RunConfig], *, base_size: int = 0, labels: Sequence[int] | None = None) -> None:
    """Raises UserError unless each network enlarges what those before it make, and all know the classes `labels`.

    `base_size`: of the images that the first is given, 0 for none.
    """
    size, classes = base_size, 0
    for number, config in enumerate(configs, start=1):
        model = config.model
        if model.low_res_size != size:
            needs = f"{model.low_res_size} px images to enlarge" if model.low_res_size else "no images to start from"
            given = f"{size} px images" if size else "none"
            raise UserError(f"stage {number} ({config.name}) takes {needs}, but is given {given}; mind the order.")
        if model.num_classes and classes and model.num_classes != classes:
            raise UserError(f"stage {number} ({config.name}) knows {model.num_classes} classes, one before {classes}.")
        check_labels(config, labels or ())
        size, classes = model.image_size, model.num_classes or classes


def check_labels(config: RunConfig, labels: Sequence[int]) -> None:
    """Raises UserError for classes that a class-conditional network does not know; others take any."""
    num_classes = config.model.num_classes
    lowest = -1 if config.model.null_class else 0
    unknown = sorted({label for label in labels if not lowest <= label < num_classes})
    if num_classes and unknown:
        raise UserError(f"class {unknown[0]} is unknown to {config.name}: it knows {lowest} to {num_classes - 1}.")


def check_guidance(config: RunConfig, guidance: float, labels: Sequence[int] | None = None) -> None:
    """Raises UserError for guidance of a network that was not trained to do without a class, or to no class."""
    if guidance == 1:
        return
    if not config.model.null_class:
        raise UserError(
            f"guidance={guidance:g}: {config.name} has no null class to be guided away from; use guidance=1, or a "
            "network trained with model.null_class=true and train.class_dropout, such as 0.1."
        )
    if guidance and NULL_LABEL in (labels or ()):
        raise UserError(
            f"guidance={guidance:g}: class {NULL_LABEL} (none) is nothing to be guided to; leave it out, or use "
            "guidance=1, or guidance=0 for samples without a class."
        )


def _denoiser(stage: Stage, conditions: Conditions) -> Denoiser:
    """The stage's network, guided where that was asked for, as a function of (x_t, time) alone."""
    if conditions.labels is None:
        return conditioned(stage.network, conditions)
    learns_variance = stage.config.diffusion.learns_variance
    return guided(stage.network, conditions, scale=stage.sampling.guidance, learns_variance=learns_variance)


def _watched(denoiser: Denoiser, num_calls: int, progress: Progress) -> Denoiser:
    """The denoiser, telling of each of its network calls."""

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        output = denoiser(x, time)
        for _ in range(num_calls):
            progress()
        return output

    return denoise


def _classes(stage: Stage, seeds: Sequence[int], labels: Sequence[int] | None) -> Sequence[int] | None:
    """The classes [n] of samples, None for an unconditional network. Raises UserError for unknown ones."""
    num_classes = stage.config.model.num_classes
    check_guidance(stage.config, stage.sampling.guidance, labels)
    if not num_classes:
        return None
    if labels is None:
        return [s % num_classes for s in seeds]
    check_labels(stage.config, labels)
    return labels
