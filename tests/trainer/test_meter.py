"""What a logging interval says, against plain sums."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.run import RunConfig
from trainer.diffusion.objectives import Losses
from trainer.meter import Meter
from trainer.processes import Processes
from trainer.tracking.records import TrainRecord

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


CLASSIFIER = {"model": {"name": "classifier", "num_classes": 4}, "diffusion": {"objective": "cross_entropy"}}


def config(*, global_batch: int = 4, micro_batch: int | None = None, of: Any = None) -> RunConfig:
    of = of or {}
    return RunConfig.model_validate(
        {
            "name": "test",
            "run": {"folder": "unused"},
            "data": {"train": "unused"},
            "model": {
                "image_size": 8,
                "channels": 8,
                "channel_mult": [1],
                "num_res_blocks": 1,
                "attention_resolutions": [],
                **of.get("model", {}),
            },
            "diffusion": {"num_timesteps": 8, "schedule": "cosine", "objective": "vlb", **of.get("diffusion", {})},
            "train": {"global_batch": global_batch, "micro_batch": micro_batch, "lr": 1e-3, "budget_images": 8},
        }
    )


def make(processes: Processes = ALONE, **options: Any) -> Meter:
    return Meter(config(**options), flops_per_image=10.0, processes=processes, peak_flops=1000.0)


def close(meter: Meter, nimg: int = 4, **figures: Any) -> TrainRecord | None:
    defaults = {"wait_seconds": 0.0, "lr": 0.1, "warmed_up": ONE, "skips_in_a_row": ZERO, "loss_scale": None}
    return meter.close_interval(nimg, **(defaults | figures))


def closed(meter: Meter, **figures: Any) -> dict[str, float]:
    """The values of the interval that is closed now."""
    close(meter, **figures)
    record = meter.flush()
    assert record is not None
    json.dumps(record.values, allow_nan=False)  # what a tracker and a reader of JSON can take
    return record.values


def add_micro_batch(meter: Meter, vb: list[float]) -> None:
    """Images of the first quartile with these losses."""
    losses = torch.tensor(vb)
    t = torch.zeros(len(vb), dtype=torch.long)
    meter.add_losses(t, torch.ones(len(vb)), Losses(losses, {"vb": losses}))


def test_figures_are_those_of_uniform_t_whatever_was_drawn() -> None:
    meter = make()
    # Timestep 0 is drawn three times as often as its share, and weighted down accordingly.
    t = torch.tensor([0, 0, 0, 5])
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    vb = torch.tensor([3.0, 6.0, 9.0, 2.0])
    meter.add_losses(t, weights, Losses(vb, {"vb": vb}))
    meter.add_step((vb * weights).mean(), torch.tensor(0.5), ZERO)
    assert close(meter, 4) is None  # one interval late
    record = meter.flush()
    assert record is not None
    values = record.values
    assert values["train/vb_q0"] == pytest.approx(6.0)  # timesteps 0 and 1
    assert values["train/vb_q2"] == pytest.approx(2.0)
    assert "train/vb_q1" not in values
    assert "train/mse" not in values
    assert values["train/vb"] == pytest.approx((1 + 2 + 3 + 2) / 4)
    assert (values["train/grad_norm"], values["train/lr"]) == (0.5, 0.1)
    assert (record.nimg, record.compute) == (4, 40.0)
    assert meter.flush() is None


def test_each_interval_has_its_own_figures() -> None:
    meter = make()
    for number, loss in enumerate([1.0, 5.0, 7.0]):
        add_micro_batch(meter, [loss, loss])
        meter.add_step(torch.tensor(loss), ONE, ZERO)
        record = close(meter, 4 * (number + 1))
        if number:
            assert record is not None
            assert (record.nimg, record.values["train/loss"]) == (4 * number, [1.0, 5.0, 7.0][number - 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_without_a_finite_loss_are_counted_apart(bad: float) -> None:
    meter = make()
    add_micro_batch(meter, [2.0, bad, 4.0, bad])
    meter.add_step(torch.tensor(bad), torch.tensor(bad), ONE)
    add_micro_batch(meter, [6.0])
    meter.add_step(torch.tensor(6.0), ONE, ZERO)
    values = closed(meter)
    assert values["train/vb"] == pytest.approx(4.0)
    assert values["train/vb_q0"] == pytest.approx(4.0)
    assert values["train/nonfinite_images"] == 2.0
    plain = make()
    add_micro_batch(plain, [1.0] * 5)
    assert closed(plain)["train/nonfinite_images"] == 0.0


def test_skipped_steps_leave_no_trace_in_the_means() -> None:
    meter = make()
    meter.add_step(torch.tensor(1.0), torch.tensor(2.0), ZERO)
    meter.add_step(torch.tensor(100.0), torch.tensor(torch.inf), ONE)
    meter.add_step(torch.tensor(torch.nan), torch.tensor(torch.nan), ONE)
    meter.add_step(torch.tensor(3.0), torch.tensor(6.0), ZERO)
    values = closed(meter, skips_in_a_row=torch.tensor(2.0))
    assert (values["train/loss"], values["train/grad_norm"]) == (2.0, 4.0)
    assert (values["train/skipped_steps"], values["train/skipped_in_a_row"]) == (2.0, 2.0)


def test_an_interval_without_a_finite_step_has_no_loss() -> None:
    meter = make()
    meter.add_step(torch.tensor(torch.nan), torch.tensor(torch.nan), ONE)
    values = closed(meter)
    assert "train/loss" not in values
    assert "train/grad_norm" not in values
    assert values["train/skipped_steps"] == 1.0


def test_state_is_as_it_was_at_the_intervals_end() -> None:
    meter = make()
    scale, skips = torch.tensor(1024.0), torch.tensor(3.0)
    meter.add_step(ONE, ONE, ZERO)
    close(meter, warmed_up=torch.tensor(0.25), skips_in_a_row=skips, loss_scale=scale)
    scale.mul_(2)
    skips.zero_()
    record = meter.flush()
    assert record is not None
    assert record.values["train/loss_scale"] == 1024.0
    assert record.values["train/skipped_in_a_row"] == 3.0
    assert record.values["train/timestep_sampler_warmed_up"] == 0.25
    meter.add_step(ONE, ONE, ZERO)
    assert "train/loss_scale" not in closed(meter)  # other precisions have none


@dataclass
class FakeClock:
    """Time that stands still unless told."""

    seconds_now: float = 0.0

    def now(self) -> float:
        return self.seconds_now

    def seconds(self, start: float, end: float) -> float:
        return end - start


def run_steps(meter: Meter, clock: FakeClock, seconds: list[float], forward: float = 0.0) -> None:
    for step in seconds:
        with meter.forward():
            clock.seconds_now += forward
        clock.seconds_now += step - forward
        meter.add_step(ONE, ONE, ZERO)


def timed(processes: Processes = ALONE) -> tuple[Meter, FakeClock]:
    meter, clock = make(processes), FakeClock()
    meter._clock = clock  # type: ignore[assignment]
    return meter, clock


def test_step_times_are_percentiles_without_the_first_of_the_life() -> None:
    meter, clock = timed()
    run_steps(meter, clock, [1000.0, *range(1, 102)])
    values = closed(meter)
    assert values["speed/step_seconds_p50"] == pytest.approx(51.0)
    assert values["speed/step_seconds_p95"] == pytest.approx(96.0)
    assert values["speed/step_seconds_max"] == pytest.approx(101.0)
    clock.seconds_now += 5.0  # logging and saving belong to the step after
    run_steps(meter, clock, [2.0])
    assert closed(meter)["speed/step_seconds_max"] == pytest.approx(7.0)


def test_the_first_step_alone_has_no_times() -> None:
    meter, clock = timed()
    run_steps(meter, clock, [1000.0], forward=900.0)
    values = closed(meter)
    assert not any(name.startswith(("speed/step", "speed/forward", "speed/slowest")) for name in values)


@dataclass(frozen=True)
class Pretended(Processes):
    """Process 0 of several; the others' figures are its own times a factor."""

    factors: tuple[float, ...] = ()
    sent: list[Tensor] = field(default_factory=list)

    def all_gather_flat(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor)
        return torch.cat([tensor * factor for factor in self.factors])


def pretended(*factors: float) -> Pretended:
    return Pretended(0, len(factors), 0, torch.device("cpu"), factors)


def test_forward_seconds_name_the_slowest_process() -> None:
    processes = pretended(1.0, 1.1, 3.0, 0.9)
    meter, clock = timed(processes)
    run_steps(meter, clock, [50.0, 10.0, 10.0], forward=4.0)
    values = closed(meter)
    assert values["speed/forward_seconds"] == pytest.approx(4.0 * (1 + 1.1 + 3 + 0.9) / 4)
    assert values["speed/slowest_process"] == 2.0
    assert values["speed/slowest_ratio"] == pytest.approx(3.0)  # the others' median is 1.0
    assert len(processes.sent) == 1  # one message an interval
    run_steps(meter, clock, [10.0], forward=2.0)
    assert closed(meter)["speed/forward_seconds"] == pytest.approx(2.0 * 1.5)


def test_one_process_alone_is_not_the_slowest() -> None:
    meter, clock = timed()
    run_steps(meter, clock, [5.0, 5.0], forward=1.0)
    values = closed(meter)
    assert values["speed/forward_seconds"] == pytest.approx(1.0)
    assert "speed/slowest_ratio" not in values


def test_replaced_images_are_counted_over_processes_and_intervals() -> None:
    meter = make(pretended(1.0, 1.0))
    for replaced in (0, 2, 1):
        meter.add_replaced(replaced)
        meter.add_step(ONE, ONE, ZERO)
    assert closed(meter)["data/replaced_images"] == 6.0  # three on each of two processes
    meter.add_step(ONE, ONE, ZERO)
    assert closed(meter)["data/replaced_images"] == 0.0


def test_sums_are_over_processes() -> None:
    meter = make(pretended(1.0, 1.0))
    add_micro_batch(meter, [2.0, 4.0])
    meter.add_step(torch.tensor(3.0), ONE, ZERO)
    meter.add_step(torch.tensor(torch.nan), ONE, ONE)
    values = closed(meter)
    assert (values["train/loss"], values["train/vb"], values["train/skipped_steps"]) == (3.0, 3.0, 1.0)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("trainer.meter.time.perf_counter", clock.now)
    return clock


def test_speed_and_mfu(wall: FakeClock) -> None:
    meter = make(pretended(1.0, 1.0))
    add_micro_batch(meter, [1.0] * 40)
    wall.seconds_now = 2.0
    values = closed(meter, wait_seconds=0.5)
    assert values["speed/img_per_second"] == 40.0  # 80 images of two processes
    assert values["speed/flops_per_second"] == 400.0
    assert values["speed/mfu"] == pytest.approx(0.2)  # of 2 x 1000
    assert values["speed/data_wait_share"] == 0.25
    add_micro_batch(meter, [1.0, torch.nan, torch.inf])  # computed all the same
    wall.seconds_now = 6.0
    values = closed(meter, wait_seconds=1.5)
    assert (values["speed/img_per_second"], values["speed/data_wait_share"]) == (1.5, 0.25)


def test_memory_is_the_most_of_any_process() -> None:
    values = closed(make(pretended(1.0, 5.0, 2.0)))
    assert values["memory/host_gb"] == pytest.approx(5 * psutil.Process().memory_info().rss / 1e9, rel=0.1)
    assert "memory/device_peak_gb" not in values


def test_noise_scale_from_both_batch_sizes() -> None:
    meter = make(global_batch=32, micro_batch=4)
    trace, square = 8.0, 0.5
    meter.add_noise(torch.tensor(square + trace / 4), torch.tensor(square + trace / 32).sqrt())
    meter.add_noise(torch.tensor(torch.inf), torch.tensor(torch.inf))  # a step that was skipped
    assert closed(meter)["train/grad_noise_scale"] == pytest.approx(trace / square, rel=1e-5)
    assert "train/grad_noise_scale" not in closed(meter)  # not measured in this interval


class NoWaiting(TorchDispatchMode):
    """Refuses to hand a tensor's value to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value"
        return func(*args, **(kwargs or {}))


def test_a_step_looks_at_no_value() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        float(torch.ones(1))  # it would be noticed
    meter = make()
    with NoWaiting():
        with meter.forward():
            add_micro_batch(meter, [1.0, float("nan")])
        meter.add_noise(ONE, ONE)
        meter.add_step(ONE, ONE, ZERO)
        assert close(meter) is None


def test_a_classifier_that_is_never_right_has_an_accuracy() -> None:
    meter = make(of=CLASSIFIER)
    t, wrong = torch.tensor([0, 1, 7]), torch.zeros(3)
    losses = Losses(torch.tensor([1.0, 3.0, 5.0]), {"cross_entropy": torch.tensor([1.0, 3.0, 5.0]), "accuracy": wrong})
    meter.add_losses(t, torch.ones(3), losses)
    meter.add_step(losses.loss.mean(), ONE, ZERO)
    values = closed(meter)
    found = {name: value for name, value in values.items() if "accuracy" in name or "entropy" in name}
    assert found == {
        "train/accuracy": 0.0, "train/accuracy_q0": 0.0, "train/accuracy_q3": 0.0,
        "train/cross_entropy": 3.0, "train/cross_entropy_q0": 2.0, "train/cross_entropy_q3": 5.0,
    }  # fmt: skip
