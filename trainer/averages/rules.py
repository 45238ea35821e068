"""How far an average of the weights follows each step: the decay that it has there, and how long it then remembers.

An average is average <- decay(step) * average + (1 - decay(step)) * weights, so it is its rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

# The relative length of the uniform average of all of training, gamma = 0; every profile is shorter.
SIGMA_REL_BOUND = 1 / math.sqrt(12)


class DecayRule(Protocol):
    """What an average is."""

    def decay(self, step: int) -> float:
        """What stays of the average at the step after `step` others, so from 0; from 0 to below 1."""
        ...


@dataclass(frozen=True)
class Exponential:
    """A constant decay, and while it is young min(constant, (1 + step) / (10 + step)), which follows faster."""

    constant: float

    def decay(self, step: int) -> float:
        return min(self.constant, (1 + step) / (10 + step))


@dataclass(frozen=True)
class PowerProfile:
    """Weights of all of training, those of time tau weighted by tau^gamma (Karras et al. 2024, section 3).

    At time t the average is (gamma + 1) / t^(gamma + 1) times the integral of tau^gamma theta(tau) from 0 to t: its
    length is a share of the training so far, and its start is forgotten. With theta(tau) = theta_s for tau in
    (s - 1, s], the weights after step s, the decay (1 - 1/t)^(gamma + 1) of their equation makes exactly this
    integral: the weight of theta_s in it is (s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1).
    """

    sigma_rel: float  # the profile's standard deviation, relative to t: above 0, below SIGMA_REL_BOUND

    @property
    def name(self) -> str:
        """What it is called in checkpoints and exports, such as "power_0.05"."""
        return f"power_{self.sigma_rel:g}"

    @classmethod
    def from_name(cls, name: str) -> PowerProfile | None:
        """The profile that is called so; None for other names."""
        kind, _, length = name.partition("_")
        return cls(float(length)) if kind == "power" else None

    @cached_property
    def gamma(self) -> float:
        """The exponent: where `sigma_rel_of` gives the length. It falls in gamma >= 0, and halving finds the float."""
        low, high = 0.0, 1 / self.sigma_rel
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if sigma_rel_of(middle) > self.sigma_rel else (low, middle)
        return middle

    def decay(self, step: int) -> float:
        return float((1 - 1 / (step + 1)) ** (self.gamma + 1))


def sigma_rel_of(gamma: float) -> float:
    """The length of a profile relative to the training so far (Karras et al. 2024, section 3), for gamma >= 0."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
