"""What a logging interval saw: sums kept on the device, read one interval late so that no step waits for them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.objectives import Losses
from trainer.processes import Processes
from trainer.tracking.records import TrainRecord

QUARTILES = 4
# Columns of the sums: per quartile of t the images, their importance weights and the weighted sums of mse and vb; then
# the whole batch's figures.
_PER_QUARTILE = ("count", "weight", "mse", "vb")
_SCALARS = ("loss", "grad_norm", "steps")


@dataclass
class _Pending:
    nimg: int
    time: float
    seconds: float
    wait: float
    lr: float
    warmed_up: Tensor
    sums: Tensor
    ready: torch.cuda.Event | None


class Meter:
    """Collects a step's figures without looking at them."""

    def __init__(self, num_timesteps: int, flops_per_image: float, processes: Processes) -> None:
        self._num_timesteps = num_timesteps
        self._flops_per_image = flops_per_image
        self._processes = processes
        self._size = QUARTILES * len(_PER_QUARTILE) + len(_SCALARS)
        self._sums = self._zeros()
        self._pending: _Pending | None = None
        self._began = time.perf_counter()
        self._last_wait = 0.0

    def _zeros(self) -> Tensor:
        return torch.zeros(self._size, dtype=torch.float64, device=self._processes.device)

    def add_losses(self, t: Tensor, weights: Tensor, losses: Losses) -> None:
        """Add one micro-batch; t, the timestep sampler's weights and the losses are [B]."""
        quartile = (t * QUARTILES) // self._num_timesteps
        table = self._sums[: QUARTILES * len(_PER_QUARTILE)].view(QUARTILES, len(_PER_QUARTILE))
        absent = torch.zeros_like(losses.loss)
        rows = torch.stack(
            [
                torch.ones_like(losses.loss),
                weights,
                absent if losses.mse is None else weights * losses.mse.detach(),
                absent if losses.vb is None else weights * losses.vb.detach(),
            ],
            dim=1,
        ).double()  # fmt: skip  [B, 3]
        table.index_add_(0, quartile, rows)

    def add_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Add one step: its mean weighted loss on this process, and the global gradient norm."""
        scalars = self._sums[-len(_SCALARS) :]
        scalars += torch.stack([loss.detach().double(), grad_norm.double(), torch.ones_like(loss).double()])

    def close_interval(self, nimg: int, *, wait_seconds: float, lr: float, warmed_up: Tensor) -> TrainRecord | None:
        """End the interval at nimg; returns the record of the interval before it.

        All processes must call it at the same nimg: the sums are added up over them.
        """
        sums = self._processes.all_reduce_sum(self._sums)
        ready = None
        if sums.is_cuda:
            sums, ready = sums.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        now = time.perf_counter()
        record = self.flush()
        self._pending = _Pending(
            nimg, time.time(), now - self._began, wait_seconds - self._last_wait, lr, warmed_up, sums, ready
        )
        self._began, self._last_wait, self._sums = now, wait_seconds, self._zeros()
        return record

    def flush(self) -> TrainRecord | None:
        """The record still pending, if any."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.ready is not None:
            pending.ready.synchronize()  # recorded an interval ago: there is nothing to wait for
        table = pending.sums[: QUARTILES * len(_PER_QUARTILE)].view(QUARTILES, len(_PER_QUARTILE))
        scalars = dict(zip(_SCALARS, pending.sums[-len(_SCALARS) :].tolist(), strict=True))
        images = float(table[:, 0].sum())
        steps = scalars["steps"]  # summed over processes
        values = {
            "train/loss": scalars["loss"] / steps,
            "train/grad_norm": scalars["grad_norm"] / steps,
            "train/lr": pending.lr,
            "train/timestep_sampler_warmed_up": float(pending.warmed_up),
            "speed/img_per_second": images / pending.seconds,
            "speed/flops_per_second": images * self._flops_per_image / pending.seconds,
            "speed/data_wait_share": pending.wait / pending.seconds,
        } | _by_quartile(table)
        return TrainRecord(pending.nimg, pending.nimg * self._flops_per_image, pending.time, values)


def _by_quartile(table: Tensor) -> dict[str, float]:
    """Means as under uniform t, whatever the timestep sampler: within each quartile, and over all t."""
    values = {}
    for column, kind in enumerate(_PER_QUARTILE[2:], start=2):
        if not table[:, column].any():
            continue  # the objective has no such term
        for quartile in range(QUARTILES):
            if table[quartile, 0] > 0:
                values[f"train/{kind}_q{quartile}"] = float(table[quartile, column] / table[quartile, 1])
        values[f"train/{kind}"] = float(table[:, column].sum() / table[:, 0].sum())
    return values


def is_finite(record: TrainRecord) -> bool:
    return math.isfinite(record.values["train/loss"]) and math.isfinite(record.values["train/grad_norm"])
