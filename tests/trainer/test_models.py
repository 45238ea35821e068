"""The networks of the study: their sizes, FLOPs and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from perturbed_networks import perturbed

from benchmarks.roofline import layers_of
from benchmarks.unet_step import CPU_PRESETS, PRESETS
from trainer.config.diffusion import DiffusionConfig, LowResNoiseConfig
from trainer.config.model import DiTConfig, UNetConfig
from trainer.models import build_model, count
from trainer.models.blocks import GroupNorm, PointwiseConv, Upsample, attend

LEARNED = DiffusionConfig()
IMAGENET64: dict[str, Any] = {"image_size": 64, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3}


@pytest.mark.parametrize(
    ("channels", "params", "gflops"),
    [(64, 30_303_494, 20.08), (96, 68_126_598, 44.86), (128, 121_063_942, 79.47), (192, 272_281_350, 178.17)],
)
def test_scaling_ladder_has_the_published_sizes(channels: int, params: int, gflops: float) -> None:
    cost = count(UNetConfig(channels=channels, **IMAGENET64), LEARNED)
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
    assert count(UNetConfig(**settings), LEARNED).num_params == params


def test_attention_is_counted() -> None:
    # qkv and output projections and the two products over 16 x 16 positions, in one encoder and two decoder blocks.
    base: dict[str, Any] = {"image_size": 16, "channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_heads": 2}
    without = count(UNetConfig(attention_resolutions=(), **base), LEARNED).forward_flops
    with_attention = count(UNetConfig(attention_resolutions=(16,), **base), LEARNED).forward_flops
    positions, width = 256, 8
    per_block = 2 * positions * width * (4 * width) + 2 * 2 * positions * positions * width
    assert with_attention - without == 3 * per_block


@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_small"])
def test_shapes_and_zero_start(variance: Any) -> None:
    model = UNetConfig(image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=3, num_heads=2)
    objective = "simple" if variance == "fixed_small" else "hybrid"
    network = build_model(model, DiffusionConfig(variance=variance, objective=objective))
    out = network(torch.randn(2, 3, 16, 16), torch.tensor([0.0, 999.5]), torch.tensor([0, 2]))
    assert out.shape == (2, 3 if variance == "fixed_small" else 6, 16, 16)
    assert (out == 0).all()  # the last convolution starts at zero


def test_time_class_and_low_resolution_all_reach_the_output() -> None:
    model = UNetConfig(
        image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=3, num_heads=2, low_res_size=4
    )
    network = perturbed(model)
    x, time, label, low = torch.randn(1, 3, 16, 16), torch.tensor([10.0]), torch.tensor([1]), torch.randn(1, 3, 4, 4)
    base = network(x, time, label, low)
    assert not torch.allclose(base, network(x, time + 1, label, low))
    assert not torch.allclose(base, network(x, time, label + 1, low))
    assert not torch.allclose(base, network(x, time, label, low + 1))


SUPER_RESOLUTION: list[Any] = [
    UNetConfig(image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, low_res_size=4),
    DiTConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, low_res_size=4),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("model", SUPER_RESOLUTION, ids=lambda model: model.name)
def test_a_network_that_is_told_of_noise_begins_as_one_that_is_not(model: Any) -> None:
    """Bit for bit, and from its weights: with more parameters, but all that act in the end are zero."""
    noisy = model.model_copy(update={"low_res_noise": LowResNoiseConfig(max_step=50)})
    plain, told = perturbed(model), build_model(noisy, LEARNED)
    missing, unexpected = told.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"low_res_time_embed"}
    x, time, low, s = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 700.0]), torch.randn(2, 3, 4, 4), torch.tensor(
        [0.0, 400.0]
    )  # fmt: skip
    assert torch.equal(told(x, time, None, low, s), plain(x, time, None, low))
    for parameter in told.low_res_time_embed.parameters():  # type: ignore[union-attr]
        parameter.add_(0.05 * torch.randn_like(parameter))
    first, second = told(x, time, None, low, s), told(x, time, None, low, s.flip(0))
    assert (first != second).flatten(1).any(dim=1).all()


def test_every_parameter_gets_a_gradient() -> None:
    model = UNetConfig(
        image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=2, num_classes=3, num_heads=2, low_res_size=8,
        low_res_noise=LowResNoiseConfig(max_step=50),
    )  # fmt: skip
    network, x = perturbed(model), torch.randn(2, 3, 16, 16)
    time = torch.tensor([1.0, 2.0])
    network(x, time, torch.tensor([0, 1]), x[..., ::2, ::2], 2 * time).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_images_of_a_batch_do_not_mix() -> None:
    network = perturbed(UNetConfig(image_size=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2))
    x, time = torch.randn(3, 3, 16, 16), torch.tensor([1.0, 500.0, 900.0])
    together = network(x, time)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], network(x[i : i + 1], time[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_names_of_the_parts() -> None:
    # Exports and published weights depend on them.
    network = build_model(
        UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=2, num_heads=1,
                    attention_resolutions=(8,)), LEARNED,
    )  # fmt: skip
    names = {name.rsplit(".", 1)[0] for name, _ in network.named_parameters()}
    res = {f"res.{part}" for part in ("norm1", "conv1", "emb", "norm2", "conv2")}
    attention = {f"attention.{part}" for part in ("norm", "qkv", "proj")}
    blocks = {"encoder.0": res | attention, "encoder.2": res | {"res.skip"}, "middle.0": res | attention,
              "middle.1": res, "decoder.0": res | {"res.skip"}, "decoder.1": res | {"res.skip"},
              "decoder.3": res | attention | {"res.skip"}, "decoder.4": res | attention | {"res.skip"}}  # fmt: skip
    others = {"time_embed.0", "time_embed.2", "class_embed", "stem", "encoder.1", "decoder.2.conv", "out_norm"}
    assert names == {f"{block}.{part}" for block, parts in blocks.items() for part in parts} | others | {"out_conv"}


def test_the_memory_format_of_the_images_does_not_matter() -> None:
    network = perturbed(UNetConfig(image_size=32, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2))
    x, time = torch.randn(2, 3, 32, 32), torch.tensor([1.0, 500.0])
    out = network(x.contiguous(memory_format=torch.channels_last), time)
    torch.testing.assert_close(out, network(x, time), rtol=1e-4, atol=1e-5)


# ---- classes ------------------------------------------------------------------------------------------------------

CLASSES: dict[str, Any] = {
    "image_size": 16, "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "num_classes": 3, "num_heads": 2,
}  # fmt: skip


def test_the_null_class_is_the_last_row() -> None:
    plain, network = perturbed(UNetConfig(**CLASSES)), perturbed(UNetConfig(**CLASSES, null_class=True))
    assert plain.class_embed.weight.shape[0] == 3  # the published weights' number
    assert network.class_embed.weight.shape[0] == 4
    x, time = torch.randn(4, 3, 16, 16), torch.tensor([1.0, 2.0, 3.0, 4.0])
    before = network(x, time, torch.tensor([-1, 2, -1, 0]))
    with torch.no_grad():
        network.class_embed.weight[3] += 1
    after = network(x, time, torch.tensor([-1, 2, -1, 0]))
    changed = (before - after).abs().amax(dim=(1, 2, 3)) > 0
    assert changed.tolist() == [True, False, True, False]


def test_a_dropped_label_without_a_null_class_is_refused() -> None:
    network = perturbed(UNetConfig(**CLASSES))
    with pytest.raises(ValueError, match="null_class=true"):
        network(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, -1]))


def test_images_that_cannot_be_halved_are_refused() -> None:
    network = perturbed(UNetConfig(image_size=16, channels=8, channel_mult=(1, 1, 2), num_res_blocks=1))
    assert network(torch.randn(1, 3, 16, 8), torch.zeros(1)).shape == (1, 6, 16, 8)
    with pytest.raises(ValueError, match=r"16x18.*multiples of 4"):
        network(torch.randn(1, 3, 16, 18), torch.zeros(1))


# ---- activation checkpointing -------------------------------------------------------------------------------------


def backward(network: torch.nn.Module) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step, and the bytes kept for its backward pass (a tensor that is kept twice counts once)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(x, time).square().sum()
    loss.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_equal_and_need_less_memory(dropout: float) -> None:
    network = perturbed(
        UNetConfig(image_size=16, channels=32, channel_mult=(1, 2), num_res_blocks=2, dropout=dropout)
    ).train()
    assert network.checkpoint_activations is False
    plain, plain_bytes = backward(network)
    network.checkpoint_activations = True
    checkpointed, checkpointed_bytes = backward(network)
    assert len(plain) == len(checkpointed) == sum(1 for _ in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert checkpointed_bytes < 0.5 * plain_bytes


# ---- the layers' quick forms against their plain ones -------------------------------------------------------------


def assert_same_function(quick: Any, plain: Any, *inputs: torch.Tensor) -> None:
    """Values and gradients with respect to all inputs agree in float64."""
    inputs = tuple(i.double().requires_grad_() for i in inputs)
    one, other = quick(*inputs), plain(*inputs)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(other)
    torch.testing.assert_close(
        torch.autograd.grad(one, inputs, grad), torch.autograd.grad(other, inputs, grad), rtol=1e-9, atol=1e-9
    )


def test_group_norm_with_scale_and_shift() -> None:
    norm = GroupNorm(64).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)

    def plain(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        h = F.group_norm(x, 32, norm.weight, norm.bias)
        return h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    assert_same_function(norm, plain, torch.randn(3, 64, 5, 4) + 2, torch.randn(3, 64), torch.randn(3, 64))
    assert_same_function(norm, lambda x: F.group_norm(x, 32, norm.weight, norm.bias), torch.randn(3, 64, 5, 4))


def test_group_norm_of_bfloat16_has_float32_statistics() -> None:
    norm = GroupNorm(32)
    x = (100 + torch.randn(2, 32, 32, 32)).bfloat16()  # the mean of 1024 such numbers is no bfloat16
    expected = F.group_norm(x.float(), 32, norm.weight, norm.bias)
    zero = torch.zeros(2, 32)
    for out in (norm(x), norm(x, zero, zero), norm(x, zero.bfloat16(), zero.bfloat16())):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)


def test_pointwise_convolution() -> None:
    conv = PointwiseConv(6, 10).double()
    assert_same_function(conv, lambda x: F.conv2d(x, conv.weight, conv.bias), torch.randn(3, 6, 5, 4))
    parameters = list(conv.parameters())
    x = torch.randn(3, 6, 5, 4, dtype=torch.double)
    one, other = conv(x).square().sum(), F.conv2d(x, conv.weight, conv.bias).square().sum()
    torch.testing.assert_close(torch.autograd.grad(one, parameters), torch.autograd.grad(other, parameters))


@pytest.mark.parametrize("size", [4, 16], ids=["small", "large"])
def test_upsampling(size: int) -> None:
    up = Upsample(6).double()
    conv = up.conv

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)

    x = torch.randn(2, 6, size, size, dtype=torch.double)
    assert_same_function(up, plain, x)
    one, other = (torch.autograd.grad(f(x).square().sum(), list(conv.parameters())) for f in (up, plain))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("positions", [64, 100], ids=["few", "many"])
def test_attention(positions: int) -> None:
    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / 8**0.5, dim=-1)
        return torch.einsum("bhts,bhcs->bhct", weights, v)

    assert_same_function(attend, plain, *(torch.randn(2, 3, 8, positions) for _ in range(3)))


@pytest.mark.parametrize("positions", [64, 256, 289])
def test_attention_in_bfloat16(positions: int) -> None:
    inputs = [torch.randn(2, 3, 8, positions).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs)
    assert out.dtype == torch.bfloat16
    exact = attend(*(i.double() for i in inputs))
    assert (out - exact).norm() < 2**-7 * exact.norm()


def test_bfloat16_autocast_stays_close() -> None:
    network = perturbed(UNetConfig(image_size=32, channels=32, channel_mult=(1, 2), num_res_blocks=1, num_classes=3))
    x, time, labels = torch.randn(2, 3, 32, 32), torch.tensor([5.0, 800.0]), torch.tensor([0, 2])
    exact = network(x, time, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = network(x, time, labels)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    rounded.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


# ---- the benchmark ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", CPU_PRESETS)
def test_the_roofline_sees_every_product(preset: str) -> None:
    model = PRESETS[preset][0]
    assert sum(layer.flops for layer in layers_of(model, batch=2)) == 2 * count(model, LEARNED).forward_flops
