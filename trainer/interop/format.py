"""What the importer must know of another code base's checkpoints: a module that has these functions is a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from data_pipeline.errors import ConfigError
from trainer.config.model import EncoderConfig
from trainer.config.run import RunConfig
from trainer.export import Weights
from trainer.models import build_model
from trainer.models.encoder import EncoderNetwork

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One parameter under both names. Both sides hold the same numbers in the same order."""

    ours: str
    theirs: str
    shape: Shape  # theirs; ours may have extra dimensions of size 1


@dataclass(frozen=True)
class FileName:
    """What a checkpoint's file name tells; None where it tells nothing."""

    weights: Weights | None = None
    iterations: int | None = None
    batch: int | None = None  # images an iteration
    ema_decay: float | None = None


class Format(Protocol):
    """The checkpoints of one code base."""

    def refusals(self, config: RunConfig) -> Iterator[str]:
        """Why it has no network that computes the same as the config's; nothing where it has one."""

    def pairs(self, network: EncoderNetwork) -> Iterator[Pair]:
        """Every parameter of our network with its name and shape there, in their order."""

    def read_name(self, name: str) -> FileName:
        """What the checkpoint's file name tells."""

    def differing_settings(self, shapes: Mapping[str, Shape], config: RunConfig) -> dict[str, tuple[object, object]]:
        """Settings in which a file differs from a config, as far as its shapes tell: key -> (file, config)."""

    def flags(self, config: RunConfig) -> list[str]:
        """Lines for a shell that tell their programs the config. Raises ConfigError for what they cannot express."""


def encoder_of(config: RunConfig) -> EncoderConfig:
    """The config's network, of the only kinds that the other code bases have. Raises ConfigError for others."""
    if not isinstance(config.model, EncoderConfig):
        raise ConfigError(
            f"model.name={config.model.name}: only the weights of UNets and classifiers can be exchanged."
        )
    return config.model


def meta_network(config: RunConfig) -> EncoderNetwork:
    """The config's network with shapes but no numbers. Raises ConfigError where it is of no kind that others have."""
    model = encoder_of(config)
    with torch.device("meta"):
        network = build_model(model, config.diffusion)
    assert isinstance(network, EncoderNetwork)
    return network
