"""When a run does what."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.run import RunConfig
from trainer.models import ModelCost


@dataclass(frozen=True)
class Milestones:
    """When the run does what, in images seen; all multiples of the global batch."""

    total: int
    log_every: int
    checkpoint_every: int | None
    exports: frozenset[int]
    ema_snapshot_every: int | None = None

    @classmethod
    def create(cls, config: RunConfig, cost: ModelCost) -> Milestones:
        """A budget of FLOPs becomes images, and every moment is moved up to the end of its step."""
        train = config.train

        def step_end(images: float) -> int:
            return max(1, -(-int(images) // train.global_batch)) * train.global_batch

        total = step_end(train.budget_images or max(1.0, (train.budget_flops or 0.0) / cost.train_flops))
        every, snapshot_every = train.checkpoint_every_images, train.ema_snapshot_every_images
        exports = {step_end(n) for n in train.export_images if step_end(n) <= total} | {total}
        return cls(
            total, step_end(train.log_every_images), step_end(every) if every else None, frozenset(exports),
            step_end(snapshot_every) if snapshot_every else None,
        )  # fmt: skip

    def saves(self, nimg: int) -> bool:
        """Whether there is a checkpoint: exports and snapshots are made from one."""
        every = self.checkpoint_every
        return nimg in self.exports or self.snapshots(nimg) or (every is not None and nimg % every == 0)

    def snapshots(self, nimg: int) -> bool:
        """Whether the averages of power profile are kept: at every multiple, and at the end."""
        every = self.ema_snapshot_every
        return every is not None and (nimg % every == 0 or nimg == self.total)

    @property
    def all_snapshots(self) -> frozenset[int]:
        every = self.ema_snapshot_every
        return frozenset({*range(every, self.total, every), self.total}) if every else frozenset()

    @property
    def all_saves(self) -> frozenset[int]:
        every = self.checkpoint_every
        return self.exports | self.all_snapshots | (set(range(every, self.total + 1, every)) if every else set())
