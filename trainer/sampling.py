"""Images from a trained network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.counter_rng import Stream
from data_pipeline.errors import UserError
from trainer.conditions import Conditions
from trainer.config.diffusion import DiffusionConfig
from trainer.config.run import RunConfig
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.guidance import NULL_LABEL, guided, num_calls_a_step
from trainer.diffusion.low_res_noise import LowResNoise
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS, to_uint8
from trainer.diffusion.samplers.langevin import langevin
from trainer.diffusion.samplers.sampler import Corrector, Noise
from trainer.diffusion.thresholding import Threshold, dynamic, static
from trainer.guiding import Guide, check_guide, guide_flops, guiding_classes, open_guide
from trainer.models import IMAGE_CHANNELS, count
from trainer.sample_noise import SampleNoise

Progress = Callable[[], object]  # called after every network call


def no_progress() -> None:
    """For whoever does not watch."""


@dataclass(frozen=True)
class Stage:
    """A network in evaluation mode, the config it was trained with, and how to sample from it."""

    network: nn.Module
    config: RunConfig
    sampling: SamplingConfig
    guide: Guide | None = None  # the classifier that `sampling` names, if it does

    def __post_init__(self) -> None:
        assert (self.guide is None) == (self.sampling.classifier is None), "see Stage.open"

    @classmethod
    def open(
        cls, network: nn.Module, config: RunConfig, sampling: SamplingConfig, device: torch.device | str = "cpu"
    ) -> Stage:
        """With the classifier that `sampling` names, on the same device. Raises UserError for one that cannot guide."""
        return cls(network, config, sampling, open_guide(config, sampling, device))

    @property
    def num_calls(self) -> int:
        """Network calls a sample."""
        return num_calls(self.config.diffusion, self.sampling)


def num_calls(diffusion: DiffusionConfig, sampling: SamplingConfig, *, stop: int = 0) -> int:
    """Network calls a sample, to step `stop`, those of a classifier among them."""
    return _num_predictions(diffusion, sampling, stop=stop) * _num_calls_each(sampling)


def sample_flops(config: RunConfig, sampling: SamplingConfig) -> float:
    """FLOPs of one sample, of the network and of the classifier. Raises UserError where that is no export."""
    each = num_calls_a_step(sampling.guidance) * count(config.model, config.diffusion).forward_flops
    return _num_predictions(config.diffusion, sampling) * (each + guide_flops(sampling))


def _num_predictions(diffusion: DiffusionConfig, sampling: SamplingConfig, *, stop: int = 0) -> int:
    """How often the sampler asks, a sample."""
    schedule = GaussianDiffusion.create(diffusion, respacing=sampling.respacing).schedule
    return SAMPLERS[sampling.sampler].num_calls(schedule, stop=stop, corrector_steps=sampling.corrector_steps)


def _num_calls_each(sampling: SamplingConfig) -> int:
    """What it takes to answer: one call of the network, two where it is guided, and one of a classifier."""
    return num_calls_a_step(sampling.guidance) + (sampling.classifier is not None)


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
        low_res: [n, C, h, w] in [-1, 1], what a super-resolution network is to enlarge. It is made as noisy as
            `stage.sampling.low_res_noise` says.
        stage_number: place in a cascade; each has noise of its own.
        progress: called for every network call, after it.

    Raises UserError for classes that the network does not know, and for guidance or noise on low_res that it cannot be
    given.
    """
    check_low_res_noise(stage.config, stage.sampling)
    step = stage.sampling.low_res_noise
    if low_res is not None:
        low_res = noisy_low_res(stage, seeds, low_res, seed=seed, stage_number=stage_number, device=device)
    images = draw(
        stage, seeds, labels=labels, low_res=low_res, low_res_step=step, seed=seed, stage_number=stage_number,
        device=device, progress=progress,
    )  # fmt: skip
    return to_uint8(images).cpu()


def draw(
    stage: Stage,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None,
    low_res: Tensor | None,
    low_res_step: int,
    stop: int = 0,
    seed: int,
    stage_number: int,
    device: torch.device | str,
    progress: Progress,
) -> Tensor:
    """What the sampler itself makes: x_0, or z_stop as noisy as the last visited step that is not below `stop`.

    As for `sample`, but for low_res, which is taken as it is, for z_s with s = `low_res_step`. Float [n, C, H, W].
    """
    size = stage.config.model.image_size
    noise = SampleNoise(seeds, (IMAGE_CHANNELS, size, size), seed=seed, stage=stage_number, device=device)
    predictor = predictor_of(
        stage, seeds, labels=labels, low_res=low_res, low_res_step=low_res_step, device=device, progress=progress
    )
    return run_sampler(stage.sampling, predictor, noise(), noise, stop=stop)


def noisy_low_res(
    stage: Stage, seeds: Sequence[int], low_res: Tensor, *, seed: int, stage_number: int, device: torch.device | str
) -> Tensor:
    """Small images [n, C, h, w] in [-1, 1] as noisy as `stage.sampling.low_res_noise` says, each by noise of its own.

    That noise is no other's: x_T and what the sampler draws are the same for every s.
    """
    low_res, step, process = low_res.to(device), stage.sampling.low_res_noise, stage.config.low_res_process
    if not step or process is None:
        return low_res
    noise = SampleNoise(
        seeds, (low_res.shape[1], low_res.shape[2], low_res.shape[3]),
        seed=seed, stage=stage_number, device=device, stream=Stream.SAMPLE_LOW_RES,
    )  # fmt: skip
    steps = torch.full((len(low_res),), step, device=device)
    return LowResNoise.create(process, device).add(low_res, steps, noise())


def predictor_of(
    stage: Stage,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    low_res: Tensor | None = None,
    low_res_step: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> Predictor:
    """The stage's network on the process that is sampled along; arguments and errors as for `draw`."""
    diffusion = GaussianDiffusion.create(stage.config.diffusion, device, stage.sampling.respacing)
    classes, process, low_res_time = _classes(stage, seeds, labels), stage.config.low_res_process, None
    if process is not None:
        low_res_time = LowResNoise.create(process).time(torch.full((len(seeds),), low_res_step))
    asked = None if classes is None else torch.tensor(classes, device=device)  # [n]
    heard = asked if stage.config.model.hears_classes else None
    denoiser = _denoiser(stage, Conditions(heard, low_res, low_res_time).map(lambda value: value.to(device)))
    watched = _watched(denoiser, _num_calls_each(stage.sampling), progress)
    score = None if stage.guide is None or asked is None else stage.guide.score(asked)
    return Predictor(watched, diffusion, threshold_of(stage.sampling), score)


def run_sampler(
    sampling: SamplingConfig, predictor: Predictor, x: Tensor, noise: Noise, *, stop: int = 0
) -> Tensor:  # fmt: skip
    """From x at the first step of the predictor's process, [B, C, H, W], by the sampler that was asked for.

    To x_0, or to the last visited step that is not below `stop`.
    """
    sampler = SAMPLERS[sampling.sampler]
    options = {name: getattr(sampling, name) for name in sampler.options}
    return sampler(predictor, x, noise=noise, stop=stop, corrector=corrector_of(sampling), **options)


def check_labels(config: RunConfig, labels: Sequence[int]) -> None:
    """Raises UserError for classes that a class-conditional network does not know; others take any."""
    num_classes = config.model.num_classes
    lowest = -1 if config.model.null_class else 0
    unknown = sorted({label for label in labels if not lowest <= label < num_classes})
    if num_classes and unknown:
        raise UserError(f"class {unknown[0]} is unknown to {config.name}: it knows {lowest} to {num_classes - 1}.")


def check_low_res_noise(config: RunConfig, sampling: SamplingConfig) -> None:
    """Raises UserError for noise on low-resolution images that the network was not trained with."""
    step, noise = sampling.low_res_noise, config.model.low_res_noise
    if step and noise is None:
        raise UserError(
            f"low_res_noise={step}: {config.name} was trained without noise on the images that it enlarges; use "
            "low_res_noise=0, or a network trained with model.low_res_noise."
        )
    if noise is not None and step > noise.max_step:
        raise UserError(
            f"low_res_noise={step}: {config.name} was trained with steps up to {noise.max_step} "
            "(model.low_res_noise.max_step); use 0 to that."
        )


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
    """The classes [n] of samples, None where nothing hears of them. Raises UserError for unknown ones."""
    num_classes = stage.config.model.num_classes or guiding_classes(stage.sampling)
    check_guidance(stage.config, stage.sampling.guidance, labels)
    if not num_classes:
        return None
    if labels is None:
        return [s % num_classes for s in seeds]
    check_labels(stage.config, labels)
    check_guide(stage.config, stage.sampling, labels)
    return labels
