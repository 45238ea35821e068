"""A sampled estimate from pilot to end: rounds of calls until the standard error asked for, or the budget's end.

Several networks may be looked at by one plan. What looks is any function of a plan: a network, or a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.nll import plan as plans
from evaluation.nll import terms as all_terms
from evaluation.nll.plan import Plan
from evaluation.nll.settings import MIN_CALLS, NllSettings
from evaluation.nll.summary import Mean, sampled_mean
from evaluation.nll.terms import Terms

# A plan, the name of its series of chunks, and whether the job ends with it -> what its calls see.
Look = Callable[[Plan, str, bool], Terms]

FIRST_ROUND = 1024  # enough to foretell how many calls are needed
# A standard error from few replicates is itself unsure: no round makes more than so many times the calls of before,
MAX_GROWTH = 4
MIN_GROWTH = 1.25  # and none is so small that its strata are coarse


@dataclass(frozen=True)
class Drawn:
    """The calls of all rounds, and what each network gave."""

    plan: Plan
    terms: tuple[Terms, ...]
    num_pilot: int  # calls a network before the first round
    num_rounds: int

    def values(self, network: int = 0) -> NDArray[np.float64]:
        """Each call's estimate of the bound, [calls]; their mean is the estimate."""
        return values(self.plan, self.terms[network])


def values(plan: Plan, terms: Terms) -> NDArray[np.float64]:
    """Each call's estimate of the bound in bits/dim: [calls]."""
    result: NDArray[np.float64] = plan.weight * terms.bits + terms.prior
    return result


def bound(drawn: Drawn, num_images: int, network: int = 0) -> Mean:
    """A network's bound, as an estimate for the split of so many images."""
    return sampled_mean(drawn.values(network), drawn.plan, num_images)


def differences(drawn: Drawn, num_images: int) -> list[Mean]:
    """Every further network's bound less the first one's, call by call of the same plan."""
    return [
        sampled_mean(drawn.values(network) - drawn.values(), drawn.plan, num_images)
        for network in range(1, len(drawn.terms))
    ]


def draw(
    looks: Sequence[Look], settings: NllSettings, num_timesteps: int, num_images: int, *, seed: int,
    stderr: Callable[[Drawn], float], final: bool = False,
) -> Drawn:  # fmt: skip
    """Draw rounds until `stderr` of what was drawn is the target, or the budget is spent.

    Without a target there is one round of the whole budget. Stopping by the standard error favours, a little, draws in
    which it came out small. `final`: the job ends with the estimate, so also with a round that must be the last one.
    """
    num_replicates = plans.replicates_for(settings.num_calls)
    size = settings.num_calls if settings.target_stderr is None else min(settings.num_calls, FIRST_ROUND)
    p, num_pilot = _probabilities(looks, settings, size, num_timesteps, num_images, seed)
    rounds: list[Plan] = []
    found: list[tuple[Terms, ...]] = []
    while True:
        rounds.append(plans.round_plan(p, num_images, size, num_replicates, seed=seed, earlier=rounds))
        last = settings.target_stderr is None or settings.num_calls - sum(map(len, rounds)) < MIN_CALLS
        found.append(
            tuple(look(rounds[-1], f"round{len(rounds) - 1}", final and last and look is looks[-1]) for look in looks)
        )
        terms = tuple(all_terms.joined(of_one) for of_one in zip(*found, strict=True))
        drawn = Drawn(plans.joined(rounds), terms, num_pilot, len(rounds))
        if settings.target_stderr is None:
            return drawn
        size = _next_round(len(drawn.plan), stderr(drawn) / settings.target_stderr, settings.num_calls)
        if size < MIN_CALLS:
            return drawn


def _probabilities(
    looks: Sequence[Look], settings: NllSettings, first_round: int, num_timesteps: int, num_images: int, seed: int
) -> tuple[NDArray[np.float64], int]:
    """p [T] for a first round of so many calls, and how many calls a network it cost."""
    if settings.mode == "uniform":
        return np.full(num_timesteps, 1 / num_timesteps), 0
    pilot = plans.pilot_plan(num_timesteps, num_images, first_round, seed=seed)
    bits = [look(pilot, "pilot", False).bits for look in looks]
    return plans.probabilities(pilot, bits, num_timesteps), len(pilot)


def _next_round(done: int, excess: float, budget: int) -> int:
    """Calls of the next round, given the standard error over its target; fewer than MIN_CALLS: there is none."""
    if excess <= 1:
        return 0
    growth = min(max(excess**2, MIN_GROWTH), MAX_GROWTH)
    return min(math.ceil(done * growth), budget) - done
