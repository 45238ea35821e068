"""What one forward and backward pass keeps in memory beside the parameters, without a GPU and without the memory.

The real network runs on the meta device, whose tensors have shapes and no elements, and the bytes of all storages
alive are counted operation by operation: what is saved for the backward pass, what is computed again in it, the
gradients on their way, autocast's copies of the weights. On the meta device the network takes the paths that it takes
on a GPU. What a kernel allocates inside itself is not seen.

At every moment those bytes are a constant and a share of each image, so two passes, of two images and of three, tell
the peak of any batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ModelConfig
from trainer.models import build_model, random_inputs

# What torch.autocast computes in half precision, among what the networks use.
_LOWERED = {
    F.conv2d, F.linear, F.conv_transpose2d, F.scaled_dot_product_attention, torch.baddbmm, torch.bmm, torch.matmul,
    Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the storages that operations make, until each is freed.

    Those of the tensors `apart` are not counted.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.history: list[int] = []  # `now` after every new storage
        self._known = {t.untyped_storage()._cdata: weakref.ref(t.untyped_storage()) for t in apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.history.append(self.now)


class AsOnGpu(TorchFunctionMode):
    """The meta device's stand-in for what a GPU does: autocast to `dtype`, and attention that is fused.

    As in torch.autocast a forward pass casts a weight once and keeps the copy to its end. In the backward pass, where
    checkpointed blocks are computed again, a copy lives as long as it is needed.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._copies: dict[int, Tensor] | None = {}
        self._inside = False
        for module in network.modules():  # all of them, since the backward pass calls some by themselves
            module.forward = self._around(module.forward)

    def end_forward(self) -> None:
        self._copies = None

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if self._inside:
                return forward(*args)
            self._inside = True
            try:
                with self:
                    return forward(*args)
            finally:
                self._inside = False

        return call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOWERED and self._dtype is not None:
            args, kwargs = tree_map(self._lower, (args, kwargs or {}))
        if func is F.scaled_dot_product_attention and args[0].is_meta and args[0].shape[-1] % 4 == 0:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return func(*args, **(kwargs or {}))

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._copies is None or not (value.is_leaf and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(self._dtype)
        return self._copies[id(value)]


def drop_gradients(network: nn.Module) -> None:
    """Let every parameter's gradient go as soon as it is there: the engine's share of memory is reckoned apart."""
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


@dataclass(frozen=True)
class Activations:
    """Bytes alive at every moment of a forward and backward pass: constant + images * per_image."""

    constant: np.ndarray  # [moments]
    per_image: np.ndarray  # [moments]

    def peak(self, batch: int) -> float:
        """The most bytes at once for so many images."""
        return float((self.constant + batch * self.per_image).max())


@lru_cache(maxsize=64)
def activations(model: ModelConfig, diffusion: DiffusionConfig, *, half: bool, checkpointing: bool) -> Activations:
    """What a forward and backward pass needs on a GPU.

    Parameters, their gradients and the images are not counted, autocast's copies of the weights are. `half`: computed
    by autocast in bf16 or fp16; `checkpointing`: see build_model.
    """
    two, three = (
        _history(model, diffusion, batch=batch, half=half, checkpointing=checkpointing) for batch in (2, 3)
    )  # fmt: skip
    return Activations(constant=3 * two - 2 * three, per_image=three - two)


def _history(
    model: ModelConfig, diffusion: DiffusionConfig, *, batch: int, half: bool, checkpointing: bool
) -> np.ndarray:  # fmt: skip
    device = torch.device("meta")
    with device:
        network = build_model(model, diffusion, checkpoint_activations=checkpointing)
    drop_gradients(network)
    x, time, conditions = random_inputs(model, batch, device)
    inputs = [tensor for tensor in (x, time, *conditions) if tensor is not None]
    gpu = AsOnGpu(network, torch.bfloat16 if half else None)
    with LiveBytes([*network.parameters(), *inputs]) as live:
        output = network(x, time, *conditions)
        gpu.end_forward()
        output.square().mean().backward()
    return np.array(live.history)
