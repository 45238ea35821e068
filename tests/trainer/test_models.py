"""The networks of the study: their sizes, FLOPs and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.config import DiffusionConfig, ModelConfig
from trainer.models import build_model, count

LEARNED = DiffusionConfig()
IMAGENET64: dict[str, Any] = {"image_size": 64, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3}


@pytest.mark.parametrize(
    ("channels", "params", "gflops"),
    [(64, 30_303_494, 20.08), (96, 68_126_598, 44.86), (128, 121_063_942, 79.47), (192, 272_281_350, 178.17)],
)
def test_scaling_ladder_has_the_published_sizes(channels: int, params: int, gflops: float) -> None:
    cost = count(ModelConfig(channels=channels, **IMAGENET64), LEARNED)
    assert cost.num_params == params
    assert round(cost.forward_flops / 1e9, 2) == gflops
    assert cost.train_flops == 3 * cost.forward_flops


@pytest.mark.parametrize(
    ("settings", "params"),
    [
        ({"image_size": 32, "channels": 128, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 3}, 52_546_438),
        ({**IMAGENET64, "channels": 192, "num_classes": 1000}, 273_049_350),
        ({"image_size": 256, "channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2,
          "num_classes": 1000, "low_res_size": 64}, 279_792_390),
        ({"image_size": 256, "channels": 128, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "num_heads": 1,
          "attention_resolutions": (16,), "use_scale_shift_norm": False}, 113_676_678),
    ],
    ids=["cifar10", "imagenet64-classes", "upsampler", "lsun256"],
)  # fmt: skip
def test_other_published_networks(settings: dict[str, Any], params: int) -> None:
    assert count(ModelConfig(**settings), LEARNED).num_params == params


def test_attention_is_counted() -> None:
    # qkv and output projections and the two products over 16 x 16 positions, in one encoder and two decoder blocks.
    base: dict[str, Any] = {"image_size": 16, "channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_heads": 2}
    without = count(ModelConfig(attention_resolutions=(), **base), LEARNED).forward_flops
    with_attention = count(ModelConfig(attention_resolutions=(16,), **base), LEARNED).forward_flops
    positions, width = 256, 8
    per_block = 2 * positions * width * (4 * width) + 2 * 2 * positions * positions * width
    assert with_attention - without == 3 * per_block


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_shapes_and_zero_start(variance: Any) -> None:
    model = ModelConfig(image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=3, num_heads=2)
    objective = "hybrid" if variance == "learned_range" else "simple"
    network = build_model(model, DiffusionConfig(variance=variance, objective=objective))
    out = network(torch.randn(2, 3, 16, 16), torch.tensor([0.0, 999.5]), torch.tensor([0, 2]))
    assert out.shape == (2, 6 if variance == "learned_range" else 3, 16, 16)
    assert (out == 0).all()  # the last convolution starts at zero


def perturbed(model: ModelConfig) -> torch.nn.Module:
    """A network whose zero-initialised layers are not zero, so that everything matters."""
    torch.manual_seed(0)
    network = build_model(model, LEARNED)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_time_class_and_low_resolution_all_reach_the_output() -> None:
    model = ModelConfig(
        image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=3, num_heads=2, low_res_size=4
    )
    network = perturbed(model)
    x, time, label, low = torch.randn(1, 3, 16, 16), torch.tensor([10.0]), torch.tensor([1]), torch.randn(1, 3, 4, 4)
    base = network(x, time, label, low)
    assert not torch.allclose(base, network(x, time + 1, label, low))
    assert not torch.allclose(base, network(x, time, label + 1, low))
    assert not torch.allclose(base, network(x, time, label, low + 1))


def test_every_parameter_gets_a_gradient() -> None:
    model = ModelConfig(image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=2, num_classes=3, num_heads=2)
    network = perturbed(model)
    network(torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_images_of_a_batch_do_not_mix() -> None:
    network = perturbed(ModelConfig(image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2))
    x, time = torch.randn(3, 3, 16, 16), torch.tensor([1.0, 500.0, 900.0])
    together = network(x, time)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], network(x[i : i + 1], time[i : i + 1]), rtol=1e-4, atol=1e-5)
