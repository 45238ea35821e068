"""A base network, ready to be looked at by the commands that make pictures of what it does."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.errors import UserError
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.respacing import count_timesteps
from trainer.export import Export, Weights, open_export
from trainer.sampling import Stage, check_guidance


def open_base_stage(
    path: Path, sampling: SamplingConfig, *, weights: Weights, device: torch.device
) -> tuple[Export, Stage]:  # fmt: skip
    """An export's network on the device.

    Raises:
        ConfigError: steps that its process has not.
        UserError: no export, a network that makes no images of its own, weights that it does not hold, guidance that
            it cannot be given.
    """
    export = open_export(path)
    config = export.config
    if config.is_classifier:
        raise UserError(f"{path}: a classifier makes no images; name a network that does.")
    if config.model.low_res_size:
        raise UserError(f"{path}: a super-resolution network starts from an image; name a base network.")
    count_timesteps(config.diffusion.num_timesteps, sampling.respacing)
    check_guidance(config, sampling.guidance)
    return export, Stage.open(export.network(weights).to(device), config, sampling, device)
