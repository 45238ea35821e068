"""Checkpoints of openai/guided-diffusion (the code of Dhariwal & Nichol 2021), its classifiers among them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipeline.errors import ConfigError
from trainer.config.model import ClassifierConfig, EncoderConfig
from trainer.config.run import RunConfig
from trainer.interop.format import FileName, encoder_of
from trainer.interop.openai_unet import (
    attention_sizes,
    diffusion_flags,
    flag_line,
    inexpressible,
    not_theirs,
    pairs,
    training_name,
    training_only,
    widths_problem,
)
from trainer.interop.traits import differing_settings

__all__ = ["differing_settings", "flags", "pairs", "read_name", "refusals"]

CHANNEL_MULT: dict[int, tuple[float, ...]] = {  # what its programs take by the image size if not told otherwise
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
SUPER_RESOLUTION: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (1, 1, 2, 2, 4, 4),
}
CLASSIFIER_HEAD = 64  # width of a classifier's heads
PUBLISHED_ITERATIONS = {  # Dhariwal & Nichol 2021, tables 11 to 13; of the other published files it says nothing
    "64x64_diffusion": 540_000,
    "128x128_diffusion": 4_360_000,
    "256x256_diffusion": 1_980_000,
    "512x512_diffusion": 1_940_000,
    "64_256_upsampler": 500_000,
    "128_512_upsampler": 1_050_000,
    "lsun_bedroom": 500_000,
    "lsun_cat": 200_000,
    "lsun_horse": 250_000,
    "64x64_classifier": 400_000,
    "128x128_classifier": 300_000,
    "256x256_classifier": 500_000,
    "512x512_classifier": 500_000,
}


def refusals(config: RunConfig) -> Iterator[str]:
    """Why it has no such network."""
    yield from not_theirs(config)


def read_name(name: str) -> FileName:
    """What a file's name tells: those that their training writes, and those that were published.

    `ema_0.9999_500000.pt`, `model500000.pt`; `64x64_diffusion.pt`, `64_256_upsampler.pt`, `lsun_cat.pt` (averages), and
    `64x64_classifier.pt` (bare weights: their classifiers' training averages nothing).
    """
    stem = name.removesuffix(".pt")
    if re.fullmatch(r"\d+x\d+_diffusion(_uncond)?|\d+_\d+_upsampler|lsun_(bedroom|cat|horse|horse_nodropout)", stem):
        return FileName("ema", PUBLISHED_ITERATIONS.get(stem))
    if re.fullmatch(r"\d+x\d+_classifier", stem):
        return FileName("model", PUBLISHED_ITERATIONS.get(stem))
    return training_name(name) or FileName()


def flags(config: RunConfig) -> list[str]:
    """MODEL_FLAGS or CLASSIFIER_FLAGS, and DIFFUSION_FLAGS, for their scripts, as lines for a shell.

    Raises ConfigError listing every setting that changes what the network computes and that they have no flag for.
    """
    problems = [*_network_problems(config), *inexpressible(config)]
    if config.diffusion.variance == "fixed_small":
        problems.append("diffusion.variance=fixed_small: its programs know fixed_large only, where none is learned")
    if problems:
        raise ConfigError("guided-diffusion cannot express this network:\n" + "\n".join(f"  {p}" for p in problems))
    model, process = encoder_of(config), diffusion_flags(config)
    if isinstance(model, ClassifierConfig):
        process = {key: process[key] for key in ("diffusion_steps", "noise_schedule", "rescale_timesteps")}
        lines = [flag_line("CLASSIFIER_FLAGS", _classifier_flags(config, model))]
    else:
        lines = [flag_line("MODEL_FLAGS", _model_flags(config, model))]
    notes = [*training_only(config), *_classifier_notes(config)]
    return [*lines, flag_line("DIFFUSION_FLAGS", process), *(f"# {note}" for note in notes)]


def _sizes(config: RunConfig) -> str:
    # A size that is twice the image's stands for none: their parser takes no empty list.
    return ",".join(map(str, attention_sizes(config) or (2 * encoder_of(config).image_size,)))


def _model_flags(config: RunConfig, model: EncoderConfig) -> dict[str, object]:
    values: dict[str, object] = {"image_size": model.image_size}
    if model.low_res_size:
        values = {"large_size": model.image_size, "small_size": model.low_res_size}
    elif model.channel_mult != CHANNEL_MULT.get(model.image_size):
        values["channel_mult"] = ",".join(map(str, model.channel_mult))
    values |= {"num_channels": model.channels, "num_res_blocks": model.num_res_blocks}
    if model.num_head_channels is None:
        values["num_heads"] = model.num_heads
    else:
        values["num_head_channels"] = model.num_head_channels
    values |= {
        "attention_resolutions": _sizes(config),
        "dropout": model.dropout,
        "class_cond": model.num_classes > 0,
        "use_scale_shift_norm": model.use_scale_shift_norm,
        "resblock_updown": model.resblock_updown,
        "learn_sigma": config.diffusion.variance == "learned_range",
    }
    order = {"use_new_attention_order": model.attention_order == "qkv_first"}
    return values if model.low_res_size else values | order


def _classifier_flags(config: RunConfig, model: ClassifierConfig) -> dict[str, object]:
    return {
        "image_size": model.image_size,
        "classifier_attention_resolutions": _sizes(config),
        "classifier_depth": model.num_res_blocks,
        "classifier_width": model.channels,
        "classifier_pool": model.pool,
        "classifier_resblock_updown": model.resblock_updown,
        "classifier_use_scale_shift_norm": model.use_scale_shift_norm,
    }


def _network_problems(config: RunConfig) -> Iterator[str]:
    model = encoder_of(config)
    kind = "classifiers" if isinstance(model, ClassifierConfig) else "super-resolution networks"
    if isinstance(model, ClassifierConfig):
        yield from widths_problem(config, CHANNEL_MULT, kind)
        if model.num_head_channels != CLASSIFIER_HEAD:
            value = "null" if model.num_head_channels is None else model.num_head_channels
            yield f"model.num_head_channels={value}: its classifiers have heads of {CLASSIFIER_HEAD} channels"
    elif model.low_res_size:
        yield from widths_problem(config, SUPER_RESOLUTION, kind)
    elif model.channel_mult != CHANNEL_MULT.get(model.image_size) and any(m % 1 for m in model.channel_mult):
        yield f"model.channel_mult={list(model.channel_mult)}: its flag for it takes whole numbers only"
    if model.attention_order == "qkv_first" and (isinstance(model, ClassifierConfig) or model.low_res_size):
        yield f"model.attention_order=qkv_first: its {kind} have heads_first only"


def _classifier_notes(config: RunConfig) -> Iterator[str]:
    """What a classifier's training there would do otherwise."""
    model, diffusion = encoder_of(config), config.diffusion
    if not isinstance(model, ClassifierConfig):
        return
    if model.dropout:
        yield f"training only: its classifiers have no dropout, model.dropout={model.dropout}"
    if diffusion.rescale_timesteps and diffusion.num_timesteps != 1000:
        yield "training only: it shows its classifiers t as it is, and rescales it in sampling alone"
