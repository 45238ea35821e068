"""Feature nets by name, behind one small interface. Another net is one more file and one more entry in the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from data_pipeline.errors import UserError
from evaluation.statistics import FeatureIdentity

if TYPE_CHECKING:
    import torch


class FeatureNet(Protocol):
    """Images -> feature vectors."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def weights_sha256(self) -> str: ...

    @property
    def resize(self) -> int:
        """Side in pixels that images are resized to before the network sees them."""
        ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [N, 3, H, W] -> float features [N, dim] on the CPU."""
        ...


def _efflite0(device: str) -> FeatureNet:
    from evaluation.features.efflite import load

    return load(device=device)


REGISTRY: dict[str, Callable[[str], FeatureNet]] = {"efflite0": _efflite0}


def get_feature_net(name: str, *, device: str = "cpu") -> FeatureNet:
    """The feature net of that name, with its weights loaded and checked.

    Raises:
        UserError: an unknown name, or weights that are not installed (names the package).
    """
    if name not in REGISTRY:
        raise UserError(f"unknown feature net {name!r}; known: {', '.join(sorted(REGISTRY))}.")
    return REGISTRY[name](device)


def identity_of(net: FeatureNet) -> FeatureIdentity:
    """What features of this net may be compared to."""
    return FeatureIdentity(net.name, net.weights_sha256, net.resize)


def metric_name(net: FeatureNet) -> str:
    """The name of the Fréchet distance in this net's features, such as `fd_efflite0`; only Inception's is FID."""
    return f"fd_{net.name}"
