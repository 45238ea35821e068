"""What a logging interval says, against plain sums."""

from __future__ import annotations

import pytest
import torch

from trainer.diffusion.objectives import Losses
from trainer.meter import Meter
from trainer.processes import Processes


def test_figures_are_those_of_uniform_t_whatever_was_drawn() -> None:
    alone = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    meter = Meter(num_timesteps=8, flops_per_image=10.0, processes=alone)
    # Timestep 0 is drawn three times as often as its share, and weighted down accordingly.
    t = torch.tensor([0, 0, 0, 5])
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    vb = torch.tensor([3.0, 6.0, 9.0, 2.0])
    meter.add_losses(t, weights, Losses(loss=vb, mse=None, vb=vb))
    meter.add_step((vb * weights).mean(), torch.tensor(0.5))
    assert meter.close_interval(4, wait_seconds=0.0, lr=0.1, warmed_up=torch.tensor(1.0)) is None  # one interval late
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
