"""ADM's additions to the UNet and the classifier: resizing residual blocks, heads, their order, rescaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from perturbed_networks import perturbed
from pydantic import ValidationError

from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ClassifierConfig, EncoderConfig, UNetConfig
from trainer.config.tree import to_yaml
from trainer.models import build_model, count
from trainer.models.blocks import Attention, Downsample, ResBlock, Upsample

PROCESS = DiffusionConfig()
BASE: dict[str, Any] = {
    "image_size": 16, "channels": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "num_classes": 3,
    "attention_resolutions": (8,), "num_head_channels": 4,
}  # fmt: skip
ADM: dict[str, Any] = {**BASE, "attention_order": "qkv_first", "resblock_updown": True}


def unet(**settings: Any) -> UNetConfig:
    return UNetConfig(**ADM | settings)


def classifier(**settings: Any) -> ClassifierConfig:
    return ClassifierConfig(**ADM | settings)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])


# ---- the blocks, against their definitions --------------------------------------------------------------------------


def block(resize: Any, *, rescale: bool = False) -> ResBlock:
    torch.manual_seed(0)
    made = ResBlock(32, 32, emb_channels=8, dropout=0.0, use_scale_shift_norm=True, rescale=rescale, resize=resize)
    torch.nn.init.normal_(made.conv2.weight, std=0.1)
    return made.double()


@pytest.mark.parametrize("resize", ["down", "up"])
def test_a_resizing_block_resizes_before_its_first_convolution_and_beside_it(resize: Any) -> None:
    res = block(resize)
    x, emb = torch.randn(2, 32, 6, 4).double(), torch.randn(2, 8).double()

    def resized(h: torch.Tensor) -> torch.Tensor:
        if resize == "up":
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))

    h = F.conv2d(resized(F.silu(F.group_norm(x, 32, res.norm1.weight, res.norm1.bias))), res.conv1.weight,
                 res.conv1.bias, padding=1)  # fmt: skip
    scale, shift = F.linear(emb, res.emb.weight, res.emb.bias)[:, :, None, None].chunk(2, dim=1)
    h = F.group_norm(h, 32, res.norm2.weight, res.norm2.bias) * (1 + scale) + shift
    expected = resized(x) + F.conv2d(F.silu(h), res.conv2.weight, res.conv2.bias, padding=1)
    torch.testing.assert_close(res(x, emb), expected, rtol=1e-10, atol=1e-10)


def test_rescaled_residuals_are_divided_by_the_square_root_of_two() -> None:
    x, emb = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 8).double()
    torch.testing.assert_close(block(None, rescale=True)(x, emb) * 2**0.5, block(None)(x, emb))
    attention, rescaled = (Attention(32, num_heads=2, rescale=rescale).double() for rescale in (False, True))
    torch.nn.init.normal_(attention.proj.weight)
    rescaled.load_state_dict(attention.state_dict())
    torch.testing.assert_close(rescaled(x) * 2**0.5, attention(x))


def test_the_two_orders_are_one_function_of_reordered_weights() -> None:
    heads_first, qkv_first = Attention(12, num_heads=3), Attention(12, num_heads=3, order="qkv_first")
    torch.nn.init.normal_(heads_first.proj.weight)
    state = heads_first.state_dict()
    for name in ("qkv.weight", "qkv.bias"):  # [(heads, qkv, width), ..] to [(qkv, heads, width), ..]
        state[name] = state[name].unflatten(0, (3, 3, 4)).transpose(0, 1).flatten(0, 2)
    x = torch.randn(2, 12, 5, 4)
    assert not torch.allclose(heads_first(x), qkv_first(x), atol=1e-3)
    qkv_first.load_state_dict(state)
    torch.testing.assert_close(heads_first(x), qkv_first(x))


# ---- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [unet(), unet(rescale_residuals=True), classifier()], ids=["unet", "rescaled", "cls"])
def test_every_parameter_learns_and_images_do_not_mix(model: EncoderConfig) -> None:
    network = perturbed(model)
    x, time, labels = inputs()
    out = network(x, time, labels)
    assert out.shape == ((2, 6, 16, 16) if isinstance(model, UNetConfig) else (2, 3))
    torch.testing.assert_close(out[1:], network(x[1:], time[1:], labels[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, network(x, time + 1, labels))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_equal(dropout: float) -> None:
    network = perturbed(unet(dropout=dropout, rescale_residuals=True)).train()
    gradients = []
    for network.checkpoint_activations in (False, True):
        network.zero_grad()
        network(*inputs()).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == sum(1 for _ in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_takes_the_place_of_the_single_convolutions() -> None:
    plain, adm = build_model(UNetConfig(**BASE), PROCESS), build_model(unet(), PROCESS)
    kinds = [[type(step) for step in network.encoder] for network in (plain, adm)]
    assert [kind for kind in kinds[0] if kind in (Downsample, Upsample)] == [Downsample] * 2
    assert [kind for kind in kinds[1] if kind is ResBlock] == [ResBlock] * 2
    assert [type(step) for step in adm.decoder].count(ResBlock) == 2
    emb, widths = 32, (8, 16)  # of the levels above the two halvings, and as many doublings from 16 channels
    block = {w: 2 * (9 * w * w + w) + 2 * 2 * w + 2 * w * (emb + 1) for w in (8, 16)}
    single = {w: 9 * w * w + w for w in (8, 16)}
    change = sum(block[w] - single[w] for w in (*widths, 16, 16))
    assert count(unet(), PROCESS).num_params - count(UNetConfig(**BASE), PROCESS).num_params == change


def test_the_defaults_are_the_old_network() -> None:
    # A config of before says nothing of the new keys.
    old = {key: value for key, value in BASE.items() if key != "num_head_channels"}
    spelled_out = {"num_head_channels": None, "attention_order": "heads_first", "resblock_updown": False}
    one, other = perturbed(UNetConfig(**old)), perturbed(UNetConfig(**old, **spelled_out, rescale_residuals=False))
    assert torch.equal(one(*inputs()), other(*inputs()))


@pytest.mark.parametrize(("head_channels", "heads"), [(4, (2, 4)), (8, (1, 2))])
def test_heads_of_a_fixed_width(head_channels: int, heads: tuple[int, int]) -> None:
    model = unet(attention_resolutions=(16, 8), num_head_channels=head_channels, num_heads=3)
    network = build_model(model, PROCESS)
    found = {m.norm.num_channels: m.num_heads for m in network.modules() if isinstance(m, Attention)}
    assert found == dict(zip((8, 16), heads, strict=True))


def test_a_first_level_of_half_the_width() -> None:
    model = unet(channels=16, channel_mult=(0.5, 1, 2))
    assert model.widths == (8, 16, 32)
    assert build_model(model, PROCESS).stem.out_channels == 8
    assert perturbed(model)(*inputs()).shape == (2, 6, 16, 16)


def test_whole_multipliers_are_written_as_before() -> None:
    assert unet(channel_mult=[1, 2.0, 0.5]).channel_mult == (1, 2, 0.5)
    assert "channel_mult:\n- 1\n- 2\n- 0.5\n" in to_yaml(unet(channel_mult=[1, 2.0, 0.5]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"num_head_channels": 3},
            r"16 channels, which model.num_head_channels=3 does not divide.*multiple of num_head",
        ),
        ({"attention_resolutions": (16,), "num_head_channels": 16}, "16x16 level has 8 channels.*num_head_channels=16"),
        ({"num_head_channels": 32}, "the middle block has 16 channels.*num_head_channels=32"),
        ({"channel_mult": (0.3, 1)}, r"model.channel_mult=\[0.3, 1\]: 0.3 x model.channels=8 is no whole number"),
        ({"channel_mult": (0, 1)}, "greater than 0"),
        ({"attention_order": "v_first"}, "heads_first"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        unet(**{"attention_resolutions": ()} | settings)
