"""When a run does what."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.models import ModelCost


@dataclass(frozen=True)
class Milestones:
    """When the run does what, in images seen; all multiples of the global batch."""

    total: int
    log_every: int
    checkpoint_every: int | None
    exports: frozenset[int]

    @classmethod
    def create(cls, config: RunConfig, cost: ModelCost) -> Milestones:
        """A budget of FLOPs becomes images, and every moment is moved up to the end of its step."""
        train = config.train

        def step_end(images: float) -> int:
            return max(1, -(-int(images) // train.global_batch)) * train.global_batch

        total = step_end(train.budget_images or max(1.0, (train.budget_flops or 0.0) / cost.train_flops))
        every = train.checkpoint_every_images
        exports = {step_end(n) for n in train.export_images if step_end(n) <= total} | {total}
        return cls(total, step_end(train.log_every_images), step_end(every) if every else None, frozenset(exports))

    def saves(self, nimg: int) -> bool:
        return nimg in self.exports or (self.checkpoint_every is not None and nimg % self.checkpoint_every == 0)
