"""Checkpoints of openai/improved-diffusion (the code of Nichol & Dhariwal 2021): names of files, flags."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipeline.errors import ConfigError
from trainer.config.model import UNetConfig
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

CHANNEL_MULT: dict[int, tuple[float, ...]] = {  # by image size: their programs have no flag for it
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
SUPER_RESOLUTION = {size: CHANNEL_MULT[size] for size in (64, 256)}


def refusals(config: RunConfig) -> Iterator[str]:
    """Why it has no such network: what ADM brought, it does not know."""
    yield from not_theirs(config)
    model = encoder_of(config)
    if not isinstance(model, UNetConfig):
        yield f"model.name={model.name}: it has UNets only; its successor has classifiers: --format guided-diffusion"
    for key, default in (("resblock_updown", False), ("num_head_channels", None), ("attention_order", "heads_first")):
        if (value := getattr(model, key)) != default:
            yield f"model.{key}={str(value).lower()}: it has no such networks; --format guided-diffusion has"


def read_name(name: str) -> FileName:
    """What a file's name tells: those that their training writes, and those that were published.

    `ema_0.9999_500000.pt`, `model500000.pt`; `cifar10_uncond_50M_500K.pt`, `lsun_uncond_100M_2400K_bs64.pt` (averages).
    """
    if match := re.fullmatch(r".+_(\d+)K(?:_bs(\d+))?\.pt", name):
        return FileName("ema", 1000 * int(match[1]), batch=int(match[2]) if match[2] else None)
    return training_name(name) or FileName()


def flags(config: RunConfig) -> list[str]:
    """MODEL_FLAGS and DIFFUSION_FLAGS for their scripts, all written out, as lines for a shell.

    Raises ConfigError listing every setting that changes what the network computes and that they have no flag for.
    """
    problems = [*_widths(config), *inexpressible(config), *_variance(config)]
    if problems:
        raise ConfigError("improved-diffusion cannot express this network:\n" + "\n".join(f"  {p}" for p in problems))
    lines = [flag_line("MODEL_FLAGS", _model_flags(config)), flag_line("DIFFUSION_FLAGS", diffusion_flags(config))]
    return [*lines, *(f"# {note}" for note in training_only(config))]


def _model_flags(config: RunConfig) -> dict[str, object]:
    model, variance = encoder_of(config), config.diffusion.variance
    size: dict[str, object] = {"image_size": model.image_size}
    if model.low_res_size:
        size = {"large_size": model.image_size, "small_size": model.low_res_size}
    values: dict[str, object] = size | {
        "num_channels": model.channels,
        "num_res_blocks": model.num_res_blocks,
        "num_heads": model.num_heads,
        # A size that no level has stands for none: their parser takes no empty list.
        "attention_resolutions": ",".join(str(s) for s in attention_sizes(config)) or "1",
        "dropout": model.dropout,
        "class_cond": model.num_classes > 0,
        "use_scale_shift_norm": model.use_scale_shift_norm,
        "learn_sigma": variance == "learned_range",
    }
    return values if model.low_res_size else values | {"sigma_small": variance == "fixed_small"}


def _widths(config: RunConfig) -> Iterator[str]:
    if encoder_of(config).low_res_size:
        return widths_problem(config, SUPER_RESOLUTION, "super-resolution networks")
    return widths_problem(config, CHANNEL_MULT, "networks")


def _variance(config: RunConfig) -> Iterator[str]:
    if config.diffusion.variance == "fixed_small" and encoder_of(config).low_res_size:
        yield "diffusion.variance=fixed_small: its super-resolution programs know fixed_large only"
