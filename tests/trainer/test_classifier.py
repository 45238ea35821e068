"""The noisy classifier's network: its pools, sizes, memory and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from perturbed_networks import perturbed
from pydantic import ValidationError

from trainer.activations import activations
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ClassifierConfig
from trainer.models import build_model, count
from trainer.models.classifier import HIDDEN, AttentionPool

PROCESS = DiffusionConfig()
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


def classifier(**settings: Any) -> ClassifierConfig:
    base: dict[str, Any] = {
        "image_size": 16, "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2, "num_classes": 5
    }  # fmt: skip
    return ClassifierConfig(**base | settings)


@pytest.mark.parametrize("pool", POOLS)
def test_logits_depend_on_image_and_time_and_every_parameter_learns(pool: str) -> None:
    network = perturbed(classifier(pool=pool))
    x, time = torch.randn(3, 3, 16, 16), torch.tensor([0.0, 10.0, 999.5])
    logits = network(x, time, torch.tensor([0, 1, 4]))
    assert logits.shape == (3, 5)
    assert logits.dtype == torch.float32
    assert not torch.allclose(logits, network(x, time + 1))
    torch.testing.assert_close(logits[:1], network(x[:1], time[:1]))  # images of a batch do not mix
    F.cross_entropy(logits, torch.tensor([0, 1, 4])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_attention_pool_is_the_published_one() -> None:
    # The mean over positions is a token before them; every token attends, and the mean's own output counts.
    pool = AttentionPool(64, 5, size=3, num_heads=4).double()
    torch.nn.init.normal_(pool.norm.weight)

    def plain(x: torch.Tensor) -> torch.Tensor:
        h = F.silu(F.group_norm(x, 32, pool.norm.weight, pool.norm.bias)).reshape(2, 64, 9)
        h = torch.cat([h.mean(dim=-1, keepdim=True), h], dim=-1) + pool.position
        q, k, v = (torch.einsum("oc,bcn->bon", pool.qkv.weight, h) + pool.qkv.bias[:, None]).chunk(3, dim=1)
        q, k, v = (part.reshape(2 * 4, 16, 10) for part in (q, k, v))
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 16**0.5, dim=-1)
        h = torch.einsum("bnm,bcm->bcn", weights, v).reshape(2, 64, 10)
        return (torch.einsum("oc,bcn->bon", pool.proj.weight, h) + pool.proj.bias[:, None])[:, :, 0]

    x = torch.randn(2, 64, 3, 3, dtype=torch.double, requires_grad=True)
    one, other = pool([torch.empty(0), x]), plain(x)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    log_p = [F.log_softmax(logits, dim=-1)[:, 2].sum() for logits in (one, other)]
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in log_p), rtol=1e-9, atol=1e-9)


def test_the_encoder_is_the_unets() -> None:
    # What a UNet of the same settings has before its decoder, under the same names.
    names = {name for name, _ in build_model(classifier(), PROCESS).named_parameters()}
    assert {name.split(".")[0] for name in names} == {"time_embed", "stem", "encoder", "middle", "pool"}
    assert {"encoder.0.res.conv1.weight", "encoder.1.weight", "middle.0.attention.qkv.weight"} <= names


@pytest.mark.parametrize("pool", POOLS)
def test_parameters_of_the_pools(pool: str) -> None:
    channels, seen, classes = 16, 8 + 8 + 8 + 16 + 16, 5  # `seen`: stem, block, downsampling, block and middle
    expected = {
        "attention": channels * (2 + 8 * 8 + 1) + (3 * channels + classes) * (channels + 1),
        "adaptive": 2 * channels + classes * channels + classes,
        "spatial": HIDDEN * seen + HIDDEN + classes * HIDDEN + classes,
        "spatial_v2": HIDDEN * seen + HIDDEN + 2 * HIDDEN + classes * HIDDEN + classes,
    }  # fmt: skip
    network = build_model(classifier(pool=pool), PROCESS)
    assert sum(p.numel() for name, p in network.named_parameters() if name.startswith("pool.")) == expected[pool]
    assert count(classifier(pool=pool), PROCESS).num_params == sum(p.numel() for p in network.parameters())


def test_what_it_costs_is_that_of_its_own_shape() -> None:
    small, more = count(classifier(), PROCESS), count(classifier(num_classes=7), PROCESS)
    assert more.num_params - small.num_params == 2 * 17
    assert more.forward_flops - small.forward_flops == 2 * 2 * 16
    plain = activations(classifier(), PROCESS, half=False, checkpointing=False).peak(4)
    assert 0 < activations(classifier(), PROCESS, half=False, checkpointing=True).peak(4) < plain


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_equal(dropout: float) -> None:
    network = perturbed(classifier(dropout=dropout)).train()
    gradients = []
    for network.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        network.zero_grad()
        network(torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == sum(1 for _ in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"32x16.*16x16"):
        perturbed(classifier())(torch.randn(1, 3, 32, 16), torch.zeros(1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 1}, "model.num_classes=1.*two classes"),
        ({"null_class": True}, "model.null_class=true.*model.null_class=false"),
        ({"low_res_size": 8}, "model.low_res_size=8.*model.low_res_size=0"),
    ],
)
def test_what_a_classifier_cannot_have(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        classifier(**settings)
