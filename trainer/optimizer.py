"""AdamW that clips, unscales and skips on the device: no step of it waits for a figure.

One place decides what becomes of a gradient, at every precision and ZeRO stage: its global norm is taken, a step
whose loss or gradient is not finite changes nothing, and fp16's loss scale follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.engine import EngineConfig
from trainer.config.train import TrainConfig

GROWTH = 2.0  # of the loss scale, after a window without overflows; an overflow divides by it


def learning_rate(config: TrainConfig, nimg: int, total: int) -> float:
    """The rate of the step that begins at image nimg of `total`: a linear warm-up, and a linear fall if so asked."""
    rate = config.lr
    if config.warmup_images:
        rate *= min(1.0, (nimg + config.global_batch) / config.warmup_images)
    return rate * (1 - nimg / total) if config.lr_decay == "linear" else rate


@dataclass
class LossScale:
    """fp16's loss scale: small gradients are multiplied out of the range where half precision loses them.

    Dynamic, as in Micikevicius et al. 2018 (Mixed Precision Training), section 3.2, with a floor: a network whose
    gradients overflow at the floor is diverging, and a smaller scale would only hide it.
    """

    value: Tensor  # float32 scalar
    good_steps: Tensor  # int64 scalar: since the last change
    floor: float
    window: int

    @classmethod
    def create(cls, config: EngineConfig, device: torch.device) -> LossScale | None:
        """None where the precision needs no scale."""
        if config.precision != "fp16":
            return None
        value = torch.tensor(config.loss_scale, dtype=torch.float32, device=device)
        good_steps = torch.zeros((), dtype=torch.int64, device=device)
        return cls(value, good_steps, config.loss_scale_floor, config.loss_scale_window)

    def at_floor(self) -> Tensor:
        """Whether the scale cannot fall further: bool scalar."""
        return self.value <= self.floor

    def get(self) -> tuple[float, int]:
        """Its value and the steps since its last change, for a checkpoint."""
        return float(self.value), int(self.good_steps)

    def set(self, value: float, good_steps: int) -> None:
        """Go on from a checkpoint's."""
        self.value.fill_(value)
        self.good_steps.fill_(good_steps)

    def update(self, overflowed: Tensor) -> None:
        """`overflowed`: bool scalar."""
        self.good_steps.add_(1).mul_(~overflowed)
        grows = self.good_steps >= self.window
        self.value.mul_(torch.where(grows, GROWTH, 1.0)).div_(torch.where(overflowed, GROWTH, 1.0))
        self.value.clamp_(min=self.floor)
        self.good_steps.mul_(~grows)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) behind a guard.

    After a step, as device scalars: `grad_norm` (global, unscaled, before clipping; float32), `skipped` (1.0 where
    nothing was changed) and `skips_in_a_row` (with fp16 only those at the scale's floor count: above it they are the
    way to find the scale).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, grad_clip: float, loss_scale: LossScale | None,
        device: torch.device, **adam: Any,
    ) -> None:  # fmt: skip
        super().__init__(parameters, fused=True, **adam)
        self.loss_scale = loss_scale
        self.grad_norm = torch.full((), torch.nan, device=device)
        self.skipped = torch.zeros((), device=device)
        self.skips_in_a_row = torch.zeros((), device=device)
        self.grad_scale: Tensor | None = None
        self.stepped = False  # since the engine last asked
        self._grad_clip = grad_clip
        self._loss = torch.zeros((), device=device)
        self._sum_squares: Callable[[Tensor], Tensor] = lambda squares: squares

    def sum_squares_with(self, total: Callable[[Tensor], Tensor]) -> None:
        """`total` makes a sum over this process's gradients one over all processes'."""
        self._sum_squares = total

    def watch_loss(self, loss: Tensor) -> None:
        """A micro-batch's loss, scalar: the step is skipped if it is not finite, whatever its gradient."""
        self._loss += loss.detach()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update with the gradients that are there, or leave everything as it is."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self._loss.device)
        self._judge(self._sum_squares(squares + 0.0 * self._loss).sqrt())  # 0 * inf and 0 * nan are nan
        # Told this, Adam's kernel leaves everything as it is. An offloaded optimizer is on another device.
        self.found_inf = self.skipped.to(gradients[0].device)
        if self.grad_scale is not None:
            self.grad_scale = self.grad_scale.to(gradients[0].device)
        super().step(closure)
        self.stepped = True

    def skip(self) -> None:
        """The engine itself saw a gradient that is not finite, and made no step."""
        self._judge(torch.full_like(self.grad_norm, torch.inf))

    def _judge(self, scaled_norm: Tensor) -> None:
        scale = self.loss_scale.value.clone() if self.loss_scale else torch.ones_like(scaled_norm)
        self.grad_norm = scaled_norm / scale
        bad = ~torch.isfinite(self.grad_norm)
        counts = bad & self.loss_scale.at_floor() if self.loss_scale else bad
        if self.loss_scale:
            self.loss_scale.update(bad)
        self.skipped = bad.float()
        self.skips_in_a_row = torch.where(bad, self.skips_in_a_row + counts.float(), 0.0)
        if self._grad_clip:
            scale = scale * (self.grad_norm / self._grad_clip).clamp(min=1.0)
        # Adam's kernel divides the gradients by this; where there is nothing to divide by, it need not read it.
        self.grad_scale = scale if self.loss_scale or self._grad_clip else None
        self._loss.zero_()
