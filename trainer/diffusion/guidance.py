"""Classifier-free guidance (Ho & Salimans 2022): further towards a class than the class itself asks for.

    eps = eps_null + scale * (eps_class - eps_null)

(their w is scale - 1, eq. 6). What a network predicts, be it eps, x_0, v or the mean of x_{t-1}, is a(t) eps + b(t) x_t
for the x_t it is given; the two weights, 1 - scale and scale, add up to one; so mixing the outputs mixes the eps, and
this file need not know what they mean. A learned variance is no such thing: it stays that of the class. The mix comes
before clipping.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trainer.conditions import Conditions
from trainer.diffusion.gaussian import Denoiser

NULL_LABEL = -1


class ConditionalNetwork(Protocol):
    """A network that also hears conditions, in the order of `Conditions`."""

    def __call__(self, x: Tensor, time: Tensor, *conditions: Tensor | None) -> Tensor: ...


def num_calls_a_step(scale: float) -> int:
    """Network calls that a sampling step makes for an image: two, unless one alone decides."""
    return 1 if scale in (0.0, 1.0) else 2


def guided(
    network: ConditionalNetwork, conditions: Conditions, *, scale: float, learns_variance: bool
) -> Denoiser:  # fmt: skip
    """The guided network as a function of (x_t, time) alone.

    Args:
        conditions: with labels; all others are the same for both calls.
        scale: 0 is the unconditional network (its variance too), 1 the conditional one, one call each; for others the
            two calls are one batch of 2B.
        learns_variance: whether the second half of the output's channels is a variance.
    """
    assert conditions.labels is not None, "guidance is towards classes"
    nothing = torch.full_like(conditions.labels, NULL_LABEL)
    if num_calls_a_step(scale) == 1:
        only = conditions if scale else conditions._replace(labels=nothing)
        return lambda x, time: network(x, time, *only)
    twice = conditions.map(lambda value: torch.cat([value, value]))
    twice = twice._replace(labels=torch.cat([conditions.labels, nothing]))

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        output = network(torch.cat([x, x]), torch.cat([time, time]), *twice)
        return mixed(*output.chunk(2), scale=scale, learns_variance=learns_variance)

    return denoise


def mixed(conditional: Tensor, unconditional: Tensor, *, scale: float, learns_variance: bool) -> Tensor:
    """The guided output of two calls' outputs, each [B, C or 2C, H, W]."""
    if not learns_variance:
        return unconditional + scale * (conditional - unconditional)
    value, variance = conditional.chunk(2, dim=1)
    null_value, _ = unconditional.chunk(2, dim=1)
    return torch.cat([null_value + scale * (value - null_value), variance], dim=1)
