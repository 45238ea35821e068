"""A network with random weights, to sample from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.config.run import load_config
from trainer.config.sampling import SamplingConfig
from trainer.config.tree import to_yaml
from trainer.export import export_info, save_export
from trainer.models import build_model
from trainer.sampling import Stage


def make_stage(path: Path, *overrides: str, respacing: str = "5", sampler: Any = "ancestral") -> Stage:
    """A network with random weights, none of them zero."""
    config = load_config(path, overrides)
    torch.manual_seed(0)
    network = build_model(config.model, config.diffusion).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return Stage(network, config, SamplingConfig(sampler=sampler, respacing=respacing))


def make_export(folder: Path, stage: Stage) -> Path:
    """An export of such a network."""
    tensors = dict(stage.network.state_dict())
    info = export_info(stage.config, nimg=8, compute=1.0, run_id="random", data="none")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weights = {"ema": tensors.__getitem__, "model": tensors.__getitem__}
    save_export(folder, weights, shapes, config=to_yaml(stage.config), info=info)
    return folder
