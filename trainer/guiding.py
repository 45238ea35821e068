"""The classifier that guides a network's samples: found, held against the network, and named by what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.config.run import RunConfig
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.classifier_guidance import classifier_score
from trainer.diffusion.predictor import Score
from trainer.export import Export, Weights, open_export

# A classifier is asked about x_t at the times that the network sees: these must mean the same noise to both.
_PROCESS = ("num_timesteps", "schedule", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "rescale_timesteps")


@dataclass(frozen=True)
class Guide:
    """A classifier in evaluation mode, on the device of the network that it guides."""

    network: nn.Module
    scale: float

    def score(self, labels: Tensor) -> Score:
        """What leads to images of these classes [B]."""
        return classifier_score(self.network, labels, scale=self.scale)


def open_guide(config: RunConfig, sampling: SamplingConfig, device: torch.device | str) -> Guide | None:
    """The classifier that `sampling` names for a network with this config; None where it names none.

    Raises UserError as `check_guide` does.
    """
    check_guide(config, sampling)
    if sampling.classifier is None:
        return None
    export = _opened(sampling.classifier, sampling.classifier_weights)
    network = export.network(sampling.classifier_weights).to(device)
    return Guide(network, sampling.classifier_scale)


def check_guide(config: RunConfig, sampling: SamplingConfig, labels: Sequence[int] | None = None) -> None:
    """Raises UserError unless the classifier, if one is named, can guide a network with this config to the labels."""
    if sampling.classifier is None:
        return
    found = _opened(sampling.classifier, sampling.classifier_weights).config
    where = f"classifier={sampling.classifier}"
    if not found.is_classifier:
        raise UserError(
            f"{where}: {found.name} (model.name={found.model.name}) is no classifier; name the export of a run with "
            "model.name=classifier."
        )
    pairs = [(f"diffusion.{key}", getattr(found.diffusion, key), getattr(config.diffusion, key)) for key in _PROCESS]
    pairs.append(("model.image_size", found.model.image_size, config.model.image_size))
    if config.model.num_classes:
        pairs.append(("model.num_classes", found.model.num_classes, config.model.num_classes))
    differing = [f"{key}={theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]
    if differing:
        raise UserError(
            f"{where} cannot guide {config.name}: it was trained with {', '.join(differing)}; train a classifier of "
            "the network's own images and noise levels."
        )
    unknown = sorted({label for label in labels or () if not 0 <= label < found.model.num_classes})
    if unknown:
        raise UserError(f"{where}: class {unknown[0]} is unknown to it: it knows 0 to {found.model.num_classes - 1}.")


def guiding_classes(sampling: SamplingConfig) -> int:
    """How many classes the classifier can lead to; 0 without one. Raises UserError for what is no export."""
    if sampling.classifier is None:
        return 0
    return _opened(sampling.classifier, sampling.classifier_weights).config.model.num_classes


def guide_flops(sampling: SamplingConfig) -> float:
    """FLOPs of one gradient of one image: the classifier's pass forward, and that back to the image."""
    if sampling.classifier is None:
        return 0.0
    training: float = _opened(sampling.classifier, sampling.classifier_weights).info["flops_per_image"]
    return 2 / 3 * training  # without the gradients of its weights


def samples_said(sampling: SamplingConfig) -> dict[str, Any]:
    """What a record says of how samples were made, and keys are made of: a classifier by its hashes, not its place."""
    if sampling.classifier is None:
        return sampling.said()
    export = _opened(sampling.classifier, sampling.classifier_weights)
    return sampling.said() | {
        "classifier_sha256": export.weights_sha256[sampling.classifier_weights],
        "classifier_config_sha256": export.config_sha256,
        "classifier_scale": sampling.classifier_scale,
    }


@lru_cache(maxsize=64)
def _opened(path: Path, weights: Weights) -> Export:
    """The export of a classifier, its files checked once: an export never changes."""
    try:
        export = open_export(path)
        export.check_holds(weights)
    except UserError as error:
        raise UserError(f"classifier={path}: {error}") from None
    return export
