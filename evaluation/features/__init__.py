"""Feature nets by name, behind one small interface. Another net is one more file and one more entry in the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_pipeline.errors import UserError
from evaluation.statistics import FeatureIdentity

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Features:
    """What a net sees in images, float32 on the CPU."""

    pool: torch.Tensor  # [N, dim]: the pooled features, of FD, KD, precision and recall
    spatial: torch.Tensor | None = None  # [N, spatial_dim]: of the spatial FD (sFID)
    probs: torch.Tensor | None = None  # [N, classes]: of the inception score


class FeatureNet(Protocol):
    """Images -> features."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def spatial_dim(self) -> int:
        """Of the spatial features; 0 for a net that gives none."""
        ...

    @property
    def num_classes(self) -> int:
        """Of the class probabilities; 0 for a net that gives none."""
        ...

    @property
    def weights_sha256(self) -> str: ...

    @property
    def resize(self) -> int:
        """Side in pixels that images are resized to before the network sees them; how, the name says."""
        ...

    def __call__(self, images: torch.Tensor) -> Features:
        """uint8 images [N, 3, H, W] -> their features."""
        ...


Loader = Callable[[str, Path | None], FeatureNet]  # (device, the user's weights file)


def _efflite0(device: str, weights: Path | None) -> FeatureNet:
    from evaluation.features.efflite import load

    if weights is not None:
        raise UserError(f"--feature-weights {weights}: efflite0's weights come with a package; leave the flag out.")
    return load(device=device)


def _inception(device: str, weights: Path | None) -> FeatureNet:
    from evaluation.features.inception import load

    return load(weights, device=device)


REGISTRY: dict[str, Loader] = {"efflite0": _efflite0, "inception": _inception}


def get_feature_net(name: str, *, device: str = "cpu", weights: Path | None = None) -> FeatureNet:
    """The feature net of that name, with its weights loaded and checked.

    `weights`: the user's file of them, for a net whose weights come with no package; without it they are downloaded.

    Raises:
        UserError: an unknown name, or weights that are not to be had (says where they come from) or of another net.
    """
    if name not in REGISTRY:
        raise UserError(f"unknown feature net {name!r}; known: {', '.join(sorted(REGISTRY))}.")
    return REGISTRY[name](device, weights)


def identity_of(net: FeatureNet) -> FeatureIdentity:
    """What features of this net may be compared to."""
    return FeatureIdentity(net.name, net.weights_sha256, net.resize)
