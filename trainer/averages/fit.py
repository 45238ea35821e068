"""Averages of the weights made after training: which sum of stored averages comes closest to one of another length.

Each stored average is an integral of the weights theta(tau) with a known profile over tau, so a sum of them is the
integral with the sum of their profiles. The factors are those whose profile is nearest to the wanted one in the mean
square (Karras et al. 2024, section 3 and appendix C), and, which is our addition, whose sum is 1. Weights change little
compared with their size: free factors that add up to 1.001 would be a thousandth of the weights themselves off, more
than all that the profile's own error costs. Times are counted in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.averages.rules import Exponential, PowerProfile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Stored:
    """An average of power profile, as it was at a step."""

    profile: PowerProfile
    step: int


@dataclass(frozen=True)
class Fit:
    """The nearest weighted mean to a wanted profile."""

    factors: Array  # of the stored averages, in their order: [n], sum 1
    error: float  # of the profile, in L2, relative to its norm: 0 is exact, 1 is nothing of it


def fit_power(stored: Sequence[Stored], wanted: PowerProfile, step: int) -> Fit:
    """The average of this profile at `step`."""
    gamma, times = _columns(stored)
    at, own = np.float64(step), np.float64(wanted.gamma)
    return _fit(stored, inner(gamma, times, own, at), float(inner(own, at, own, at)))


def fit_exponential(stored: Sequence[Stored], wanted: Exponential, step: int) -> Fit:
    """The average of this decay at `step`; its profile is that of the steps, constant over each."""
    weights = step_weights(wanted, step)  # [step]
    inners = [weights[: s.step] @ power_weights(s.profile, s.step) for s in stored]
    return _fit(stored, np.array(inners), float(weights @ weights))


def inner(gamma_a: Array, time_a: Array, gamma_b: Array, time_b: Array) -> Array:
    """The integral of the product of power profiles over all times, in closed form; elementwise.

    (a + 1) (b + 1) / (A^(a + 1) B^(b + 1)) times the integral of tau^(a + b) up to min(A, B), for exponents a, b and
    times A, B: of the powers of A and B only the later one's profile at the earlier time is left, so none overflows.
    """
    early, late = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    gamma_late = np.where(time_a >= time_b, gamma_a, gamma_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    result: Array = scale * (early / late) ** gamma_late / late
    return result


def power_weights(profile: PowerProfile, step: int) -> Array:
    """What each step's weights count in the average after `step` of them, in closed form: [step], sum 1."""
    result: Array = np.diff((np.arange(step + 1) / step) ** (profile.gamma + 1))
    return result


def step_weights(rule: Exponential | PowerProfile, step: int) -> Array:
    """The same of any rule, by multiplying its decays; 1 less their sum is what the initial weights count."""
    decays = np.array([rule.decay(s) for s in range(step)])
    left = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # what later steps leave of each
    result: Array = (1 - decays) * left
    return result


def _columns(stored: Sequence[Stored]) -> tuple[Array, Array]:
    """Exponents and times: [n] each."""
    return np.array([s.profile.gamma for s in stored]), np.array([float(s.step) for s in stored])


def _fit(stored: Sequence[Stored], inners: Array, square: float) -> Fit:
    """Solve the normal equations with a multiplier for the sum; `inners` [n]: with the wanted profile, whose own with
    itself is `square`.

    In profiles of norm 1: those of the first snapshots are large and would spoil the condition of the matrix.
    """
    gamma, times = _columns(stored)
    gram = inner(gamma[:, None], times[:, None], gamma, times)  # [n, n]
    norms = np.sqrt(np.diag(gram))
    gram, inners = gram / np.outer(norms, norms), inners / norms
    sums = norms.min() / norms  # the sum of the factors, in these units
    system = np.block([[gram, sums[:, None]], [sums, np.zeros(1)]])
    factors = np.linalg.lstsq(system, np.append(inners, norms.min()), rcond=None)[0][:-1]
    rest = square - 2 * inners @ factors + factors @ gram @ factors
    return Fit(factors / norms, math.sqrt(max(0.0, rest) / square))
