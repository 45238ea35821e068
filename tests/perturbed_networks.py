"""Networks in which everything matters."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ModelConfig
from trainer.models import build_model


def perturbed(model: ModelConfig) -> Any:
    """A network whose zero-initialised layers are not zero; it is of the class that the config's name says."""
    torch.manual_seed(0)
    network = build_model(model, DiffusionConfig())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network
