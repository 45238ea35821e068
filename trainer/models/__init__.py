"""Networks by name, and what one costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.conditions import Conditions
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ClassifierConfig, ModelConfig
from trainer.models.classifier import Classifier
from trainer.models.dit import DiT
from trainer.models.unet import UNet

# Of a network's own config, and channels in and out, to a module that is called with (x, time, *Conditions).
NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT, "classifier": Classifier}
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class ModelCost:
    num_params: int
    forward_flops: float  # of one image, 2 per multiply-add

    @property
    def train_flops(self) -> float:
        """FLOPs of training on one image: forward and the two products of the backward pass, no recomputation."""
        return 3.0 * self.forward_flops


def build_model(
    model: ModelConfig, diffusion: DiffusionConfig, *,
    image_channels: int = IMAGE_CHANNELS, checkpoint_activations: bool = False,
) -> nn.Module:  # fmt: skip
    """The network of a config, with fresh weights from the current generator.

    `checkpoint_activations`: train with less memory, computing activations again for the backward pass.
    """
    out_channels = _out_channels(model, diffusion, image_channels)
    network = NETWORKS[model.name](model, in_channels=image_channels, out_channels=out_channels)
    network.checkpoint_activations = checkpoint_activations  # type: ignore[assignment]
    return network


def _out_channels(model: ModelConfig, diffusion: DiffusionConfig, image_channels: int) -> int:
    """An image's, twice where the variance is learned; of a classifier the logits."""
    if isinstance(model, ClassifierConfig):
        return model.num_classes
    return image_channels * (2 if diffusion.learns_variance else 1)


def random_inputs(
    model: ModelConfig, batch: int, device: torch.device, *, image_channels: int = IMAGE_CHANNELS
) -> tuple[Tensor, Tensor, Conditions]:
    """What the network is called with: x [B, C, H, W], time [B] and the conditions that it hears."""
    x = torch.randn(batch, image_channels, model.image_size, model.image_size, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device) if model.hears_classes else None
    size = model.low_res_size
    low_res = torch.randn(batch, image_channels, size, size, device=device) if size else None
    low_res_time = torch.rand(batch, device=device) if model.low_res_noise else None
    return x, torch.rand(batch, device=device), Conditions(labels, low_res, low_res_time)


@lru_cache(maxsize=64)
def count(model: ModelConfig, diffusion: DiffusionConfig, *, image_channels: int = IMAGE_CHANNELS) -> ModelCost:
    """Parameters and forward FLOPs of one image, traced on the meta device: nothing is allocated.

    Of images by default; `image_channels` may be those of an autoencoder's latents, which published figures are of. The
    meta device matters: on the CPU the fused attention kernel is invisible to the counter.
    """
    with torch.device("meta"):
        network = build_model(model, diffusion, image_channels=image_channels)
    x, time, conditions = random_inputs(model, 1, torch.device("meta"), image_channels=image_channels)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, time, *conditions)
    return ModelCost(
        num_params=sum(p.numel() for p in network.parameters()), forward_flops=float(counter.get_total_flops())
    )
