"""What a logging interval saw: sums kept on the device, read one interval late so that no step waits for them.

A step whose loss or gradient is not finite counts as skipped and leaves no trace in the means, nor does a single image
whose loss is not finite. All that the processes have to tell each other goes into one all-gather an interval.

Speeds are of the wall time between two ends of intervals, with everything in it: data, logging, checkpoints. The time
of a step is from the end of the step before to its own, on the main process; the first of a life (compilation, warm-up)
is left out of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import psutil
import torch
from torch import Tensor

from trainer.clock import Clock, Moment
from trainer.config.run import RunConfig
from trainer.diffusion.objectives import Losses, part_names
from trainer.noise_scale import SmoothedNoiseScale
from trainer.processes import Processes
from trainer.tracking.records import TrainRecord

QUARTILES = 4
# Columns of the sums: per quartile of t the images, their importance weights and the weighted sums of the objective's
# parts; then the whole batch's figures; ...
_PER_QUARTILE = ("count", "weight")
_MICRO = ("nonfinite_images",)
_STEP = ("loss", "grad_norm", "steps", "skipped_steps")
_NOISE = ("noise_small", "noise_big", "noise_count")
_SCALARS = (*_MICRO, *_STEP, *_NOISE)
# ... what is so at the interval's end, on the device, and what this process's host knows.
_STATE = ("warmed_up", "skips_in_a_row", "loss_scale")
_OWN = ("forward_seconds", "host_gb", "device_peak_gb", "replaced_images")

_Spans = list[tuple[Moment, Moment]]  # starts and ends


@dataclass
class _Pending:
    """An interval that has ended and is not read yet."""

    nimg: int
    time: float
    seconds: float
    wait: float
    lr: float
    figures: Tensor  # [world_size, columns]
    step_ends: list[Moment]
    ready: torch.cuda.Event | None


class Meter:
    """Collects a step's figures without looking at them."""

    def __init__(self, config: RunConfig, flops_per_image: float, processes: Processes, peak_flops: float) -> None:
        """`peak_flops`: FLOP/s of one device, for MFU."""
        self._num_timesteps = config.diffusion.num_timesteps
        self._parts = part_names(config.diffusion, config.model.num_classes)
        self._columns = len(_PER_QUARTILE) + len(self._parts)
        self._table = QUARTILES * self._columns
        self._global_batch = config.train.global_batch
        self._micro_batch = min(
            config.train.micro_batch or self._global_batch, self._global_batch // processes.world_size
        )
        self._flops_per_image, self._processes = flops_per_image, processes
        self._peak = peak_flops * processes.world_size
        self._noise = SmoothedNoiseScale(small=self._micro_batch, big=self._global_batch)
        self._clock = Clock(processes.device)
        self._sums = self._zeros()
        self._skipped_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=processes.device)  # _STEP
        self._pending: _Pending | None = None
        self._began = time.perf_counter()
        self._last_wait = 0.0
        self._forwards: _Spans = []  # of this interval
        self._forwards_before: tuple[_Spans, int] = ([], 0)  # of the one before, with its number of steps
        self._step_ends: list[Moment] = []  # of this interval, after the last one of the interval before
        self._steps = 0  # of this interval
        self._replaced = 0  # images of this interval
        self._warm = False  # whether the life's first step is over

    def _zeros(self) -> Tensor:
        return torch.zeros(self._table + len(_SCALARS), dtype=torch.float64, device=self._processes.device)

    # ---- in a step ----------------------------------------------------------------------------------------------

    def add_losses(self, t: Tensor, weights: Tensor, losses: Losses) -> None:
        """Add one micro-batch; t, the timestep sampler's weights and the losses are [b]."""
        parts = [weights * losses.parts[name].detach() for name in self._parts]
        rows = torch.stack([torch.ones_like(losses.loss), weights, *parts], dim=1).double()  # [b, columns]
        finite = rows.isfinite().all(dim=1) & losses.loss.detach().isfinite()  # [b]
        quartile = (t * QUARTILES) // self._num_timesteps
        table = self._sums[: self._table].view(QUARTILES, self._columns)
        table.index_add_(0, quartile, torch.where(finite[:, None], rows, 0.0))
        self._add(_MICRO, (~finite).sum(dim=0, keepdim=True))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the network's forward pass: this process's own time in it."""
        start = self._clock.now()
        yield
        if self._warm:
            self._forwards.append((start, self._clock.now()))

    def add_replaced(self, num_images: int) -> None:
        """Add the damaged images of a step that others took the place of."""
        self._replaced += num_images

    def add_noise(self, small_square: Tensor, grad_norm: Tensor) -> None:
        """Add a step measured for the gradient noise scale.

        `small_square` is the mean squared gradient norm of this process's micro-batches, `grad_norm` the norm of the
        global batch's gradient: device scalars.
        """
        row = torch.stack([small_square.double(), grad_norm.double().square(), torch.ones_like(small_square).double()])
        self._add(_NOISE, torch.where(row.isfinite().all(), row, 0.0))

    def add_step(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """End a step: its mean weighted loss on this process, the global gradient norm, and 1.0 if it was skipped.

        All are device scalars.
        """
        loss = loss.detach()
        row = torch.stack([loss, grad_norm, torch.ones_like(loss), torch.zeros_like(loss)]).double()
        done = (skipped == 0) & row.isfinite().all()
        self._add(_STEP, torch.where(done, row, self._skipped_row))
        self._step_ends.append(self._clock.now())
        self._steps += int(self._warm)
        self._warm = True

    def _add(self, columns: tuple[str, ...], row: Tensor) -> None:
        start = self._table + _SCALARS.index(columns[0])
        self._sums[start : start + len(columns)] += row

    # ---- at an interval's end -----------------------------------------------------------------------------------

    def close_interval(
        self, nimg: int, *, wait_seconds: float, lr: float, warmed_up: Tensor, skips_in_a_row: Tensor,
        loss_scale: Tensor | None,
    ) -> TrainRecord | None:  # fmt: skip
        """End the interval at nimg; returns the record of the interval before it.

        All processes must call it at the same nimg. `wait_seconds` (for data) count from the start of this life;
        `loss_scale` is fp16's. The last three are device scalars.
        """
        device = self._processes.device
        none = torch.full((), torch.nan, dtype=torch.float64, device=device)
        state = [none if s is None else s.to(device, torch.float64) for s in (warmed_up, skips_in_a_row, loss_scale)]
        own = torch.tensor(self._own_figures(), dtype=torch.float64, pin_memory=device.type == "cuda")
        mine = torch.cat([self._sums, torch.stack(state), own.to(device, non_blocking=True)])
        figures = self._processes.all_gather_flat(mine).view(self._processes.world_size, -1)
        ready = None
        if figures.is_cuda:
            figures, ready = figures.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        now = time.perf_counter()
        record = self.flush()
        wait = wait_seconds - self._last_wait
        self._pending = _Pending(
            nimg, time.time(), now - self._began, wait, lr, figures, self._step_ends, ready
        )  # fmt: skip
        self._step_ends = self._step_ends[-1:]
        self._began, self._last_wait, self._sums = now, wait_seconds, self._zeros()
        return record

    def _own_figures(self) -> list[float]:
        """`_OWN`, in that order. On a GPU the forward's seconds are of the interval before, which can be read now."""
        ended, self._forwards_before = self._forwards_before, (self._forwards, self._steps)
        self._forwards, self._steps = [], 0
        cuda = self._processes.device.type == "cuda"
        spans, steps = ended if cuda else self._forwards_before
        seconds = sum(self._clock.seconds(start, end) for start, end in spans)
        peak = torch.cuda.max_memory_allocated(self._processes.device) if cuda else 0
        host = psutil.Process().memory_info().rss
        replaced, self._replaced = self._replaced, 0
        return [seconds / steps if steps else 0.0, host / 1e9, peak / 1e9, float(replaced)]

    def flush(self) -> TrainRecord | None:
        """The record still pending, if any."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.ready is not None:
            pending.ready.synchronize()  # recorded an interval ago: there is nothing to wait for
        sums = pending.figures[:, : self._table + len(_SCALARS)].sum(dim=0)
        rest = pending.figures[:, len(sums) :]
        state = dict(zip(_STATE, rest[0].tolist(), strict=False))  # the same on all processes
        own = {name: rest[:, len(_STATE) + i].tolist() for i, name in enumerate(_OWN)}
        table = sums[: self._table].view(QUARTILES, self._columns)
        scalars = dict(zip(_SCALARS, sums[self._table :].tolist(), strict=True))
        images = float(table[:, 0].sum()) + scalars["nonfinite_images"]
        flops_per_second = images * self._flops_per_image / pending.seconds
        values = {
            "train/lr": pending.lr,
            "train/timestep_sampler_warmed_up": state["warmed_up"],
            "train/skipped_steps": scalars["skipped_steps"] / self._processes.world_size,
            "train/skipped_in_a_row": state["skips_in_a_row"],
            "train/nonfinite_images": scalars["nonfinite_images"],
            "data/replaced_images": sum(own["replaced_images"]),
            "speed/img_per_second": images / pending.seconds,
            "speed/flops_per_second": flops_per_second,
            "speed/mfu": flops_per_second / self._peak,
            "speed/data_wait_share": pending.wait / pending.seconds,
            "memory/host_gb": max(own["host_gb"]),
        }
        if scalars["steps"]:  # summed over processes
            values["train/loss"] = scalars["loss"] / scalars["steps"]
            values["train/grad_norm"] = scalars["grad_norm"] / scalars["steps"]
        if not math.isnan(state["loss_scale"]):
            values["train/loss_scale"] = state["loss_scale"]
        if any(own["device_peak_gb"]):
            values["memory/device_peak_gb"] = max(own["device_peak_gb"])
        values |= _by_quartile(table, self._parts) | _forward(own["forward_seconds"])
        values |= self._step_seconds(pending) | self._noise_scale(scalars)
        return TrainRecord(pending.nimg, pending.nimg * self._flops_per_image, pending.time, values)

    def _step_seconds(self, pending: _Pending) -> dict[str, float]:
        ends = pending.step_ends
        seconds = [self._clock.seconds(a, b) for a, b in pairwise(ends)]
        if not seconds:
            return {}
        p50, p95 = np.percentile(seconds, [50, 95]).tolist()
        return {
            "speed/step_seconds_p50": p50,
            "speed/step_seconds_p95": p95,
            "speed/step_seconds_max": max(seconds),
        }

    def _noise_scale(self, scalars: dict[str, float]) -> dict[str, float]:
        count = scalars["noise_count"]
        if not count:
            return {}
        scale = self._noise.add(scalars["noise_small"] / count, scalars["noise_big"] / count)
        return {} if scale is None else {"train/grad_noise_scale": scale}


def _by_quartile(table: Tensor, parts: tuple[str, ...]) -> dict[str, float]:
    """Means as under uniform t, whatever the timestep sampler: within each quartile, and over all t."""
    values: dict[str, float] = {}
    if not table[:, 0].any():
        return values  # no image had a finite loss
    for column, kind in enumerate(parts, start=len(_PER_QUARTILE)):
        for quartile in range(QUARTILES):
            if table[quartile, 0] > 0:
                values[f"train/{kind}_q{quartile}"] = float(table[quartile, column] / table[quartile, 1])
        values[f"train/{kind}"] = float(table[:, column].sum() / table[:, 0].sum())
    return values


def _forward(seconds: list[float]) -> dict[str, float]:
    """A step's seconds in the forward pass, by process: their mean, and who is slowest by how much.

    The ratio is to the median of the others, so that it means the same with two processes as with many.
    """
    if not all(seconds):
        return {}  # no step of this life has been timed yet
    values = {"speed/forward_seconds": statistics.mean(seconds)}
    if len(seconds) > 1:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
        values |= {"speed/slowest_process": float(slowest), "speed/slowest_ratio": seconds[slowest] / others}
    return values
