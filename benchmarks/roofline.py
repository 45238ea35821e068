"""The least time a training step can take: layer by layer, the larger of arithmetic and memory traffic.

Norms, activations, residual sums and dropout are taken as fused into their neighbours and cost nothing. Each
convolution, linear layer and attention reads its inputs and writes its output once; so do both products of its
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ModelConfig
from trainer.models import IMAGE_CHANNELS, build_model
from trainer.models.blocks import Attention
from trainer.models.dit import SelfAttention

# AdamW reads weight, gradient and two moments and writes all but the gradient; EMA reads two and writes one. float32.
OPTIMIZER_BYTES_PER_PARAM = 4 * (4 + 3 + 3)


@dataclass(frozen=True)
class Layer:
    """One layer's forward pass on a batch."""

    flops: float  # 2 per multiply-add
    elements: float  # read and written: inputs, weights, outputs

    def seconds(self, *, peak: float, bandwidth: float, bytes_per_element: int) -> float:
        return max(self.flops / peak, self.elements * bytes_per_element / bandwidth)


def layers_of(model: ModelConfig, batch: int) -> list[Layer]:
    """The layers with products in them, traced on the meta device."""
    layers: list[Layer] = []

    def product(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = module.weight
        flops = 2 * output.numel() * (weight.numel() // weight.shape[0])
        layers.append(Layer(flops, inputs[0].numel() + weight.numel() + output.numel()))

    def attention(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        x = inputs[0]  # [B, C, H, W], or tokens [B, N, C]
        positions = x.shape[2:].numel() if x.ndim == 4 else x.shape[1]
        layers.append(Layer(4 * x.numel() * positions, 4 * x.numel()))

    with torch.device("meta"), torch.no_grad():
        network = build_model(model, DiffusionConfig())
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(product)
            elif isinstance(module, Attention | SelfAttention):
                module.register_forward_hook(attention)
        network(torch.empty(batch, IMAGE_CHANNELS, model.image_size, model.image_size), torch.zeros(batch))
    return layers


def step_seconds(
    model: ModelConfig, batch: int, *, num_params: int, peak: float, bandwidth: float, bytes_per_element: int
) -> float:
    """The roofline of a training step in seconds: three passes over the layers, one over the optimizer's state.

    `peak` in FLOP/s, `bandwidth` in bytes/s.
    """
    forward = sum(
        layer.seconds(peak=peak, bandwidth=bandwidth, bytes_per_element=bytes_per_element)
        for layer in layers_of(model, batch)
    )
    return 3 * forward + OPTIMIZER_BYTES_PER_PARAM * num_params / bandwidth
