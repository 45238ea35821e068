"""What is measured: weights of an export made ready on a device, alone or as an ensemble."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation.ensemble import Ensemble, TimeRanges, check_fit
from evaluation.request import ACCURACY
from trainer.conditions import Conditions
from trainer.config.run import RunConfig
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.export import SUFFIX, Export, Weights, open_export
from trainer.sampling import Stage, conditioned


@dataclass(frozen=True)
class Subject:
    """A network to be measured, with the export that it comes from."""

    export: Export
    weights: Weights
    network: nn.Module  # in evaluation mode, on the device
    device: torch.device
    sha256: str  # of the weights' file; of an ensemble, what `weights_identity` says

    def diffusion(self, respacing: str | None = None) -> GaussianDiffusion:
        """The process it was trained for, or a shorter one. Raises UserError for steps that it has not."""
        return GaussianDiffusion.create(self.export.config.diffusion, self.device, respacing)

    def condition(self, labels: NDArray[np.int64]) -> Denoiser:
        """The network for images of these classes [n]; an unconditional one asks for none."""
        known = torch.from_numpy(labels).to(self.device) if self.export.config.model.num_classes else None
        return conditioned(self.network, Conditions(labels=known))

    def stage(self, sampling: SamplingConfig) -> Stage:
        """It as it is to be sampled from. Raises UserError for a classifier that cannot guide it."""
        return Stage.open(self.network, self.export.config, sampling, self.device)

    def check_data(self, dataset: ShardDataset) -> None:
        """Raises UserError for images of another size or of other classes than the network's."""
        check_data(self.export.config, dataset)


def check_data(config: RunConfig, dataset: ShardDataset) -> None:
    """Raises UserError for images of another size or of other classes than the network's."""
    model, there = config.model, dataset.manifest
    if model.low_res_size:
        raise UserError(
            "a super-resolution network has no likelihood or samples of its own; see what it makes of a base "
            "network's images: `python -m evaluation.sample BASE UPSAMPLER --out samples.npz`."
        )
    if there.image_size != model.image_size:
        raise UserError(
            f"the network makes {model.image_size}x{model.image_size} images, those in {dataset.place} are "
            f"{there.image_size}x{there.image_size}; name a split of the network's size."
        )
    if model.num_classes not in (0, there.num_classes):
        raise UserError(
            f"the network knows {model.num_classes} classes, {dataset.place} has {there.num_classes}; name a "
            "split with the classes it was trained on."
        )


def check_kind(config: RunConfig, metrics: Sequence[str]) -> None:
    """Raises UserError for metrics of images asked of a classifier, and the other way round."""
    others = [metric for metric in metrics if metric != ACCURACY]
    if config.is_classifier and others:
        raise UserError(
            f"--metrics {','.join(others)}: {config.name} is a classifier, which has no likelihood and makes no "
            f"images; ask for --metrics {ACCURACY}, or let it guide another network's samples (--classifier)."
        )
    if not config.is_classifier and ACCURACY in metrics:
        raise UserError(f"--metrics {ACCURACY} is of classifiers (model.name=classifier), which {config.name} is not.")


def open_subject(
    export: Path | Export, *, weights: Weights = "ema", device: torch.device | str = "cpu",
    ensemble: Ensemble | None = None,
) -> Subject:  # fmt: skip
    """Load an export's weights, and those of the ensemble's other network.

    Raises UserError for a path that is no export, weights that it does not hold, networks that do not go together.
    """
    own = open_export(export) if isinstance(export, Path) else export
    network = own.network(weights).to(device)
    if ensemble is not None:
        other = open_export(ensemble.export)
        check_fit(own.config, other.config, ensemble.below)
        diffusion = own.config.diffusion
        scale = 1000.0 / diffusion.num_timesteps if diffusion.rescale_timesteps else 1.0
        boundary = (ensemble.below - 0.5) * scale  # halfway between two steps: rounding decides nothing
        network = TimeRanges(other.network(weights).to(device), network, boundary).eval()
    sha256 = own.weights_sha256[weights] if ensemble is None else weights_identity(own, weights, ensemble)
    return Subject(own, weights, network, torch.device(device), sha256)


def weights_identity(export: Export, weights: Weights, ensemble: Ensemble | None = None) -> str:
    """What names a network in the key of an evaluation: its weights, how they are read, the ensemble's other network.

    Raises UserError for weights that an export does not hold.
    """
    parts = [_identity(export, weights)]
    if ensemble is not None:
        parts += [_identity(open_export(ensemble.export), weights), str(ensemble.below)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _identity(export: Export, weights: Weights) -> str:
    """Equal weights under another config (schedule, prediction, ...) are another network."""
    export.check_holds(weights)
    return f"{export.weights_sha256[weights]} {export.config_sha256}"


def identity_in_manifest(files: Mapping[str, Any], weights: Weights) -> str:
    """`weights_identity` of a lone network from its export's manifest, without looking at the files themselves."""
    both = f"{files[f'{weights}{SUFFIX}']['sha256']} {files['config.yaml']['sha256']}"
    return hashlib.sha256(both.encode()).hexdigest()
