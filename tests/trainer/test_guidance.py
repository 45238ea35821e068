"""Classifier-free guidance: its algebra, what it costs, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_stage import make_stage
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.cascade import sample_cascade
from trainer.conditions import Conditions
from trainer.config.diffusion import DiffusionConfig
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.guidance import guided, mixed, num_calls_a_step
from trainer.sampling import Stage, check_guidance, sample

CLASSES = ("model.num_classes=4", "model.null_class=true")
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TIME = torch.tensor([3.0, 50.0, 90.0])
LABELS = torch.tensor([0, 3, 1])


def with_guidance(stage: Stage, guidance: float) -> Stage:
    return Stage(stage.network, stage.config, stage.sampling.model_copy(update={"guidance": guidance}))


class Watched:
    """A network whose calls are counted by their batch."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.batches: list[int] = []

    def __call__(self, x: Tensor, *others: Any) -> Tensor:
        self.batches.append(len(x))
        output: Tensor = self.network(x, *others)
        return output


@torch.no_grad()
@pytest.mark.parametrize("learns_variance", [True, False])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_one_doubled_batch_is_two_calls(tiny_config: Path, scale: float, learns_variance: bool) -> None:
    fixed = () if learns_variance else ("diffusion.variance=fixed_small", "diffusion.objective=simple")
    network = Watched(make_stage(tiny_config, *CLASSES, *fixed).network)
    found = guided(network, Conditions(LABELS), scale=scale, learns_variance=learns_variance)(X, TIME)
    assert network.batches == [6]
    of_class, of_none = network(X, TIME, LABELS, None), network(X, TIME, torch.full_like(LABELS, -1), None)
    assert (of_class != of_none).any()
    expected = of_none[:, :3] + scale * (of_class[:, :3] - of_none[:, :3])
    torch.testing.assert_close(found[:, :3], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 3:], of_class[:, 3:], rtol=0, atol=1e-5)
    assert found.shape == of_class.shape


@torch.no_grad()
def test_scales_one_and_zero_take_one_call(tiny_config: Path) -> None:
    network = Watched(make_stage(tiny_config, *CLASSES).network)
    for scale, labels in ((1.0, LABELS), (0.0, torch.full_like(LABELS, -1))):
        assert torch.equal(
            guided(network, Conditions(LABELS), scale=scale, learns_variance=True)(X, TIME),
            network(X, TIME, labels, None),
        )
    assert network.batches == [3, 3, 3, 3]
    assert [num_calls_a_step(scale) for scale in (0.0, 1.0, 0.5, 2.0)] == [1, 1, 2, 2]


@torch.no_grad()
def test_both_calls_see_the_small_images(tiny_config: Path) -> None:
    network = make_stage(tiny_config, *CLASSES, "model.low_res_size=8").network
    low_res = torch.randn(3, 3, 8, 8)
    found = guided(network, Conditions(LABELS, low_res), scale=2.0, learns_variance=True)(X, TIME)
    nothing = torch.full_like(LABELS, -1)
    expected = mixed(
        network(X, TIME, LABELS, low_res), network(X, TIME, nothing, low_res), scale=2.0, learns_variance=True
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "previous_mean"])
def test_mixing_outputs_mixes_eps(kind: Any) -> None:
    """Whatever the network predicts: the guided output reads as eps_null + g (eps_class - eps_null)."""
    process = GaussianDiffusion.create(DiffusionConfig(num_timesteps=50, prediction=kind))
    generator = torch.Generator().manual_seed(1)
    x, of_class, of_none = torch.randn(3, 4, 3, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.tensor([0, 1, 20, 49])
    output = mixed(of_class, of_none, scale=2.5, learns_variance=False)
    _, found = process.x0_and_eps(kind, output, x, t)
    _, eps_class = process.x0_and_eps(kind, of_class, x, t)
    _, eps_null = process.x0_and_eps(kind, of_none, x, t)
    torch.testing.assert_close(found, eps_null + 2.5 * (eps_class - eps_null), rtol=1e-9, atol=1e-9)


def test_samples_are_guided(tiny_config: Path) -> None:
    stage = make_stage(tiny_config, *CLASSES)
    plain, strong = sample(stage, range(4)), sample(with_guidance(stage, 4.0), range(4))
    assert (plain != strong).float().mean() > 0.1
    nothing = sample(with_guidance(stage, 0.0), range(4))
    assert torch.equal(nothing, sample(stage, range(4), labels=[-1] * 4))
    assert torch.equal(nothing, sample(with_guidance(stage, 0.0), range(4), labels=[-1] * 4))


def test_calls_are_counted_honestly(tiny_config: Path) -> None:
    stage = make_stage(tiny_config, *CLASSES)
    for guidance, expected in ((1.0, 5), (0.0, 5), (2.0, 10)):
        guided_stage, calls = with_guidance(stage, guidance), []
        sample(guided_stage, range(2), progress=lambda calls=calls: calls.append(1))  # type: ignore[misc]
        assert guided_stage.num_calls == len(calls) == expected


def test_what_cannot_be_guided_is_refused(tiny_config: Path) -> None:
    stage = make_stage(tiny_config, *CLASSES)
    without = make_stage(tiny_config, "model.num_classes=4", "name=without")
    unconditional = make_stage(tiny_config, "name=unconditional")
    for known in (without, unconditional):
        for guidance in (0.0, 2.0):
            with pytest.raises(UserError, match=f"guidance={guidance:g}: {known.config.name} has no null class"):
                sample(with_guidance(known, guidance), range(2))
        check_guidance(known.config, 1.0)
    with pytest.raises(UserError, match=r"class -1 \(none\) is nothing to be guided to"):
        sample_cascade([with_guidance(stage, 2.0)], range(2), labels=[1, -1])
    with pytest.raises(UserError, match="unknown"):
        sample(with_guidance(stage, 2.0), range(2), labels=[1, 4])
    assert SamplingConfig().guidance == 1.0
