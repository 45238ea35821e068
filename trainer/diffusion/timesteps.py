"""Timestep samplers: from uniform numbers in [0, 1) to timesteps and their importance weights.

Where the numbers come from is the other half: a pure function of (seed, image number), independent of one another or,
for stratified draws, one in each of a global batch's equal parts of [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig

HISTORY = 10  # losses remembered of each timestep (Nichol & Dhariwal 2021, section 3.3)
UNIFORM_SHARE = 0.001  # of the draws stay uniform, so that no timestep is ever forgotten


class UniformSampler:
    """Every timestep equally often: the interface of a timestep sampler, and the one without memory."""

    needs_losses = False

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.device = device

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers [B] in [0, 1) -> t [B] int64, and weights [B] that keep the loss's expectation."""
        t = (u * self.num_timesteps).long().clamp_(max=self.num_timesteps - 1)
        return t, torch.ones_like(u, dtype=torch.float32)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in a step's timesteps and unweighted losses [global batch], in order of global position."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def warmed_up_share(self) -> Tensor:
        """Share of timesteps whose history is full, scalar."""
        return torch.ones((), device=self.device)


class LossSecondMomentSampler:
    """p_t proportional to the root mean square of timestep t's last losses (eq. 18); uniform until all have ten.

    The weights are 1 / (T p_t). The history is a ring per timestep; its update is one scatter a step.
    """

    needs_losses = True

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.history = torch.zeros(num_timesteps, HISTORY, dtype=torch.float64, device=device)  # [T, 10]
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)  # [T] losses seen so far

    def probabilities(self) -> Tensor:
        """[T] float64, summing to 1. A tensor choice, not a Python one: the device is not waited for."""
        rms = self.history.square().mean(dim=1).sqrt()
        learned = (1 - UNIFORM_SHARE) * rms / rms.sum().clamp_min(1e-300) + UNIFORM_SHARE / self.num_timesteps
        uniform = torch.full_like(learned, 1 / self.num_timesteps)
        return torch.where((self.counts >= HISTORY).all(), learned, uniform)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        cdf = p.cumsum(0)
        t = torch.searchsorted(cdf, u.double() * cdf[-1], right=True).clamp_(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        # A loss that is not finite would spoil its timestep's weight: it goes to a row that is thrown away.
        t = torch.where(losses.isfinite(), t, self.num_timesteps)
        order = torch.argsort(t, stable=True)  # groups a timestep's losses, keeping their global order
        t, losses = t[order], losses[order].double()
        position = torch.arange(len(t), device=t.device)
        # The rank of each loss within its timestep, counted from the front and from the back of its group.
        rank = position - torch.searchsorted(t, t, right=False)
        from_back = torch.searchsorted(t, t, right=True) - 1 - position
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        slot = (counts[t] + rank) % HISTORY
        # So does, of more than ten at once, an older loss that would share a newer one's slot.
        row = torch.where(from_back < HISTORY, t, self.num_timesteps)
        padded = torch.cat([self.history, self.history.new_zeros(1, HISTORY)])
        padded[row, slot] = losses
        self.history.copy_(padded[:-1])
        counts.index_add_(0, t, torch.ones_like(t))
        self.counts.copy_(counts[:-1])

    def state(self) -> dict[str, Tensor]:
        return {"history": self.history, "counts": self.counts}

    def load(self, state: dict[str, Tensor]) -> None:
        self.history.copy_(state["history"])
        self.counts.copy_(state["counts"])

    def warmed_up_share(self) -> Tensor:
        return (self.counts >= HISTORY).double().mean()


def make_timestep_sampler(
    config: DiffusionConfig, device: torch.device | str = "cpu"
) -> UniformSampler | LossSecondMomentSampler:
    """The sampler of a config; "stratified" is the uniform one fed with stratified numbers."""
    if config.timestep_sampler == "loss_second_moment":
        return LossSecondMomentSampler(config.num_timesteps, device)
    return UniformSampler(config.num_timesteps, device)
