"""Says where a step's values stop being finite: which weight, or which layer forward or backward, and at which t.

The step is computed once more with a listener at every module. It costs a few steps' time, once, at a run's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.processes import Processes

MOST_NAMED = 8  # of a list of images


@dataclass(frozen=True)
class Recomputed:
    """The images of a step that was computed again; each [n]."""

    t: Tensor
    numbers: Tensor  # images' numbers in the run
    losses: Tensor


def diagnose(
    network: nn.Module, recompute: Callable[[], Recomputed], weights: Iterable[tuple[str, Tensor]], processes: Processes
) -> str:
    """One sentence or two for the user; all processes must call it together, and all get the same.

    `recompute` repeats forward and backward of this process's part of the bad step, without an update. `weights` are
    this process's parts of the weights, by name.
    """
    text = _of_weights(weights)
    with torch.compiler.set_stance("force_eager"), _listen(network) as found:
        step = recompute()  # all do: there may be collective calls in it
    text = text or _of_step(found, step)
    for rank, other in enumerate(processes.gather_objects(text)):
        if other:
            return other if processes.world_size == 1 else f"process {rank}: {other}"
    return "computed again, all values and each process's gradients are finite"


@dataclass
class _Found:
    """The first places where something is not finite, in order of execution."""

    forward: str = ""
    backward: str = ""


def _of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    names = [name for name, weight in weights if not weight.isfinite().all()]
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the weights themselves are not finite: {names[0]}{more}"


def _of_step(found: _Found, step: Recomputed) -> str:
    bad = (~step.losses.isfinite()).nonzero().flatten()
    where = f" for {_rows(step, bad)}" if len(bad) else ""
    if found.forward:
        return f"{found.forward}{where}"
    if where:
        return f"all layers gave finite values, but the loss is not finite{where}"
    return found.backward and f"all values and losses are finite forward, but {found.backward}"


def _rows(step: Recomputed, rows: Tensor) -> str:
    t, numbers = ([str(v) for v in values[rows[:MOST_NAMED]].tolist()] for values in (step.t, step.numbers))
    more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
    return f"t = {', '.join(t)} (images {', '.join(numbers)}){more}"


@contextmanager
def _listen(network: nn.Module) -> Iterator[_Found]:
    """Note, while the context lasts, the first value and the first gradient that is not finite."""
    found = _Found()
    handles: list[Any] = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(_before(name, found)))
        handles.append(module.register_forward_hook(_after(name, found)))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            handles.append(
                parameter.register_hook(_note_gradient(f"the gradient of the weight {name} is not finite", found))
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _before(name: str, found: _Found) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not name and not found.forward and not _finite(inputs):
            found.forward = "what enters the network is not finite"
        # Each module gets an alias of its own, so that the gradient there is this module's alone.
        return tuple(_alias(name, value, found) for value in inputs)

    return hook


def _alias(name: str, value: Any, found: _Found) -> Any:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    alias = value.view_as(value)
    alias.register_hook(
        _note_gradient(f"the gradient that {_layer(name)} hands back to its input is not finite", found)
    )
    return alias


def _after(name: str, found: _Found) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if not found.forward and not _finite(output):
            found.forward = f"{_layer(name)} gave values that are not finite"

    return hook


def _note_gradient(text: str, found: _Found) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if not found.backward and not gradient.isfinite().all():
            found.backward = text

    return hook


def _layer(name: str) -> str:
    return f"layer {name}" if name else "the network"


def _finite(values: Any) -> bool:
    """Of a tensor, or of a tuple or list with tensors in it."""
    if isinstance(values, tuple | list):
        return all(_finite(value) for value in values)
    return not isinstance(values, Tensor) or bool(values.detach().isfinite().all())
