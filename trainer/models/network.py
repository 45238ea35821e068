"""What the networks have in common: a config, classes by number, blocks that may be computed again."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config.model import ModelConfig

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class Network(nn.Module, Generic[ConfigT]):
    """A network of a config, called with (x, timesteps, *Conditions).

    With `checkpoint_activations` a training step keeps the blocks' inputs only and computes the blocks again for the
    backward pass: less memory for one forward pass more, and the same gradients.
    """

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False

    def class_rows(self, labels: Tensor | None) -> Tensor | None:
        """The class embedding's rows of labels: [B] -> [B]; None where there are no classes.

        A label below 0 means "no class" (`model.null_class`), the last row. Raises ValueError (on the CPU, where
        looking costs nothing) for labels below 0 without a null class.
        """
        if not self.config.num_classes:
            return None
        assert labels is not None, "a class-conditional network needs labels"
        if self.config.null_class:
            return torch.where(labels < 0, self.config.num_classes, labels)
        if labels.device.type == "cpu" and bool((labels < 0).any()):
            raise ValueError(
                'labels below 0 mean "no class", which this network has none of; '
                "train with model.null_class=true, or give every image a class"
            )
        return labels

    def beside_low_res(self, x: Tensor, low_res: Tensor | None) -> Tensor:
        """x [B, C, H, W] joined by channels with the low-resolution images, enlarged, where the network has them."""
        if not self.config.low_res_size:
            return x
        assert low_res is not None, "a super-resolution network needs the low-resolution images"
        enlarged = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([x, enlarged.to(x.dtype)], dim=1)

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A block's output; while training and if so asked, without what its backward pass needs."""
        if not (self.checkpoint_activations and self.training and torch.is_grad_enabled()):
            plain: Tensor = block(*inputs)
            return plain
        # The generator's state is kept only where a dropout mask has to be drawn again.
        output: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
        return output
