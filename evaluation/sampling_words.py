"""How to sample, from `key=value` words on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.errors import ConfigError, UserError
from trainer.config import parse_overrides, validate
from trainer.diffusion.respacing import count_timesteps
from trainer.export import Export, Weights, open_export
from trainer.guiding import check_guide
from trainer.sampling import Stage, check_guidance
from trainer.sampling_config import SamplingConfig


def open_stage(
    path: Path, words: Sequence[str], *, sampler: str, num_steps: int, weights: Weights, device: torch.device
) -> tuple[Export, Stage]:  # fmt: skip
    """An export's network on the device, to be sampled from as the words say, else by `sampler` in `num_steps` steps.

    Raises:
        ConfigError: settings that are unknown or impossible, steps that the process has not.
        UserError: no export, a network that makes no images of its own, weights that it does not hold, guidance that
            it cannot be given.
    """
    export = open_export(path)
    config, num_timesteps = export.config, export.config.diffusion.num_timesteps
    if config.is_classifier:
        raise UserError(f"{path}: {config.name} is a classifier, which makes no images; name a network that does.")
    if config.model.low_res_size:
        raise UserError(f"{path}: a super-resolution network starts from an image; name a base network.")
    defaults = {"sampler": sampler, "respacing": str(min(num_steps, num_timesteps))}
    sampling = validate(SamplingConfig, defaults | parse_overrides(words), source="settings of the sampling")
    count_timesteps(num_timesteps, sampling.respacing)
    check_guidance(config, sampling.guidance)
    check_guide(config, sampling)
    return export, Stage.open(export.network(weights).to(device), config, sampling, device)


def split_words(words: Sequence[str]) -> list[str]:
    """Those that are settings. Raises ConfigError for one that is none."""
    for word in words:
        if word.startswith("-") or "=" not in word:
            raise ConfigError(f"unknown argument {word!r}; settings of the sampling are given as respacing=100.")
    return list(words)
