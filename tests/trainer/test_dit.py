"""The diffusion transformer: its published sizes, what it computes, its config, and training it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from perturbed_networks import perturbed
from random_stage import make_export, make_stage
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, silu

from benchmarks.roofline import layers_of
from data_pipeline.errors import ConfigError
from evaluation.evaluate import evaluate
from evaluation.nll.settings import NllSettings
from evaluation.request import EvalRequest
from trainer.activations import LiveBytes, activations, drop_gradients
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import DiTConfig
from trainer.config.run import load_config
from trainer.config.sampling import SamplingConfig
from trainer.config.tree import save_config
from trainer.diagnosis import Recomputed, diagnose
from trainer.export import open_export
from trainer.interop import improved_diffusion
from trainer.interop.convert import meta_network
from trainer.memory import memory_of
from trainer.models import build_model, count, random_inputs
from trainer.models.dit import DiT, image, patches, position_embedding
from trainer.processes import Processes
from trainer.sampling import Stage, sample
from trainer.tracking.records import read_train_records

LEARNED = DiffusionConfig()
TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "num_heads": 4}
LABELLED = DiTConfig(**TINY, num_classes=3, null_class=True)
# Peebles & Xie 2023, table 4: forward Gflops of 4x32x32 latents, learned variance, 1000 classes and "none". What is
# called FLOPs there are multiply-adds, those of attention's two products included.
PUBLISHED_GFLOPS = {
    "S/8": 0.36, "S/4": 1.41, "S/2": 6.06, "B/8": 1.42, "B/4": 5.56, "B/2": 23.01,
    "L/8": 5.01, "L/4": 19.70, "L/2": 80.71, "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64,
}  # fmt: skip
PUBLISHED_MILLIONS = {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}  # of parameters


@pytest.mark.parametrize("name", PUBLISHED_GFLOPS)
def test_the_published_table(name: str) -> None:
    size, patch_size = name.split("/")
    model = DiTConfig(image_size=32, size=size, patch_size=int(patch_size), num_classes=1000, null_class=True)
    cost = count(model, LEARNED, image_channels=4)
    assert cost.forward_flops / 2 / 1e9 == pytest.approx(PUBLISHED_GFLOPS[name], rel=0.01)
    if name in PUBLISHED_MILLIONS:
        assert round(cost.num_params / 1e6) == PUBLISHED_MILLIONS[name]


def test_patch_64px_is_as_many_tokens_as_latents_of_256px() -> None:
    latents = count(DiTConfig(image_size=32, size="S", patch_size=2), LEARNED, image_channels=4)
    pixels = count(DiTConfig(image_size=64, size="S", patch_size=4), LEARNED)
    assert pixels.forward_flops == pytest.approx(latents.forward_flops, rel=0.01)


def inputs(model: DiTConfig, batch: int = 3) -> tuple[Tensor | None, ...]:
    """What the network is called with: x, time, and the conditions that it hears."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, model.image_size, model.image_size, generator=generator)
    labels = torch.arange(batch) % model.num_classes if model.num_classes else None
    low = torch.randn(batch, 3, 4, 4, generator=generator) if model.low_res_size else None
    low_time = torch.linspace(100, 300, batch) if model.low_res_noise else None
    return x, torch.linspace(0, 999.5, batch), labels, low, low_time


# ---- what it computes -----------------------------------------------------------------------------------------------


def plain(network: DiT, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """The paper's figure 3 once more, in float64, with loops over patches and a softmax written out."""
    config, w = network.config, {name: p.detach().double() for name, p in network.named_parameters()}
    size, side, width = config.patch_size, config.grid_size, config.width

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = time.double()[:, None] * frequencies
    emb = linear("time_embed.2", silu(linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    emb = silu(emb + w["class_embed.weight"][labels])
    corners = [(i * size, j * size) for i in range(side) for j in range(side)]
    tokens = torch.stack([x.double()[:, :, i : i + size, j : j + size].flatten(1) for i, j in corners], dim=1)
    h = linear("patch_embed", tokens) + position_embedding(side, width).double()
    for number in range(config.depth):
        block = f"blocks.{number}"
        six = linear(f"{block}.modulation", emb)[:, None].chunk(6, dim=2)
        q, k, v = linear(f"{block}.attention.qkv", norm(h, six[0], six[1])).chunk(3, dim=2)
        heads = []
        for part in range(config.num_heads):
            d = width // config.num_heads
            own = slice(part * d, (part + 1) * d)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / d**0.5
            heads.append(scores.softmax(dim=2) @ v[..., own])
        h = h + six[2] * linear(f"{block}.attention.proj", torch.cat(heads, dim=2))
        hidden = gelu(linear(f"{block}.mlp.0", norm(h, six[3], six[4])), approximate="tanh")
        h = h + six[5] * linear(f"{block}.mlp.2", hidden)
    tokens = linear("out_proj", norm(h, *linear("out_modulation", emb)[:, None].chunk(2, dim=2)))
    out = torch.zeros(len(x), 6, config.image_size, config.image_size, dtype=torch.float64)
    for number, (i, j) in enumerate(corners):
        out[:, :, i : i + size, j : j + size] = tokens[:, number].unflatten(1, (6, size, size))
    return out


@pytest.mark.parametrize("patch_size", [1, 2, 8])  # 256 tokens: fused attention; 64 and 4: plain products
def test_it_is_the_papers_network(patch_size: int) -> None:
    network = perturbed(DiTConfig(**TINY | {"patch_size": patch_size}, num_classes=3, null_class=True))
    x, time, *_ = inputs(network.config)
    assert x is not None
    assert time is not None
    with torch.no_grad():
        found = network(x, time, torch.tensor([2, -1, 0]))
    expected = plain(network, x, time, torch.tensor([2, 3, 0]))  # the last row is "no class"
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_patches_and_back() -> None:
    x = torch.randn(2, 3, 12, 12)
    tokens = patches(x, 4)
    assert torch.equal(tokens[:, 1], x[:, :, :4, 4:8].flatten(1))  # row by row
    assert torch.equal(image(tokens, 4), x)
    assert torch.equal(patches(x.contiguous(memory_format=torch.channels_last), 4), tokens)


def test_positions_are_sinusoids_of_column_and_row() -> None:
    table = position_embedding(3, 8)
    for row in range(3):
        for column in range(3):
            sines = [torch.tensor([float(p), p / 100]) for p in (column, row)]  # frequencies 1 and 10,000 ** -0.5
            expected = torch.cat([part for angle in sines for part in (angle.sin(), angle.cos())])
            torch.testing.assert_close(table[3 * row + column], expected)


def test_it_starts_as_zero_with_blocks_that_do_nothing() -> None:
    torch.manual_seed(0)
    network = build_model(LABELLED, LEARNED)
    assert isinstance(network, DiT)
    out = network(*inputs(LABELLED))
    assert out.shape == (3, 6, 16, 16)
    assert (out == 0).all()
    h, emb = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert all(torch.equal(block(h, emb), h) for block in network.blocks)
    bound = (6 / (32 + 128)) ** 0.5  # xavier, uniform
    weight = network.blocks[0].mlp[0].weight  # type: ignore[index, union-attr]
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    assert float(network.time_embed[0].weight.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_classes": 3},
        {"low_res_size": 4},
        {"low_res_size": 4, "low_res_noise": {"max_step": 300}},
        {"mlp_ratio": 2.5},
    ],
    ids=str,
)
def test_everything_reaches_the_output_and_learns(extra: dict[str, Any]) -> None:
    network = perturbed(DiTConfig(**TINY, **extra))
    told = inputs(network.config)
    base = network(*told)
    for place, value in enumerate(told):
        if value is not None:
            other = value.roll(1, dims=0)  # what another image is told
            assert not torch.allclose(base, network(*told[:place], other, *told[place + 1 :]))
    base.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    torch.testing.assert_close(base[1:2], network(*(None if value is None else value[1:2] for value in told)))


def test_what_it_cannot_be_called_with() -> None:
    with pytest.raises(ValueError, match="16x16"):
        perturbed(LABELLED)(torch.randn(1, 3, 20, 20), torch.zeros(1), torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"model\.null_class=true"):
        perturbed(DiTConfig(**TINY, num_classes=3))(torch.randn(1, 3, 16, 16), torch.zeros(1), torch.tensor([-1]))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_keeps_the_gradients(dropout: float) -> None:
    network = perturbed(DiTConfig(**TINY, dropout=dropout)).train()
    gradients = []
    for checkpointing in (False, True):
        network.checkpoint_activations = checkpointing
        torch.manual_seed(5)
        loss = network(*inputs(network.config)).square().mean()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    torch.manual_seed(6)
    assert (float(network(*inputs(network.config)).square().mean()) != float(loss)) == (dropout > 0)


def test_half_precision_keeps_the_stream_of_tokens_in_float32() -> None:
    network = perturbed(LABELLED)
    seen: list[torch.dtype] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    exact = network(*inputs(LABELLED))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*inputs(LABELLED))
    assert set(seen) == {torch.float32}
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 0.03


# ---- its config -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dit_config(tiny_config: Path, tmp_path: Path) -> Path:
    path = tmp_path / "dit.yaml"
    path.write_text(
        f"base: {tiny_config}\nmodel: {{name: dit, patch_size: 4, width: 32, depth: 2, num_heads: 4}}\n"
        "train: {lr: 1.0e-3}\n"
    )
    return path


def test_a_size_is_spelled_out_in_the_resolved_config(dit_config: Path, tmp_path: Path) -> None:
    base = tmp_path / "s.yaml"
    base.write_text(dit_config.read_text().replace("width: 32, depth: 2, num_heads: 4", "size: S"))
    config = load_config(base, ["model.size=L"])
    assert isinstance(config.model, DiTConfig)
    assert (config.model.depth, config.model.width, config.model.num_heads) == (24, 1024, 16)
    save_config(config, tmp_path / "resolved.yaml")
    assert "width: 1024" in (tmp_path / "resolved.yaml").read_text()
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (["model.size=S"], ["model.depth=2: model.size=S has 12", "model.size=null"]),
        (["model.size=M"], ["model.size='M'", "'S', 'B', 'L' or 'XL'"]),
        (["model.patch_size=5"], ["model.patch_size=5", "model.image_size=16"]),
        (["model.width=30"], ["model.width=30", "model.num_heads=4"]),
        (["model.width=30", "model.num_heads=3"], ["model.width=30", "multiple of 4"]),
        (["model.width=null"], ["model.width=None"]),
        (["model.mlp_ratio=0.001"], ["model.mlp_ratio=0.001"]),
        (["model.channels=8"], ["model.channels=8: unknown key", "width"]),
        (["model.low_res_size=16"], ["model.low_res_size=16"]),
    ],
    ids=lambda value: value[0],
)
def test_what_no_network_can_be(dit_config: Path, override: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(dit_config, override)
    for part in expected:
        assert part in str(caught.value)


def test_weights_are_not_exchanged(dit_config: Path) -> None:
    config = load_config(dit_config)
    with pytest.raises(ConfigError, match=r"model\.name=dit: only the weights of"):
        improved_diffusion.flags(config)
    with pytest.raises(ConfigError, match=r"model\.name=dit"):
        meta_network(config)


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_memory_is_known_before_the_start(dit_config: Path) -> None:
    config = load_config(dit_config)
    plain, recomputed = (
        activations(LABELLED, LEARNED, half=True, checkpointing=checkpointing) for checkpointing in (False, True)
    )
    assert 0 < recomputed.peak(64) < 0.5 * plain.peak(64)
    part = memory_of(load_config(dit_config, ["engine.zero_stage=3"]), 2)
    assert part.moments == 8 * count(config.model, config.diffusion).num_params / 2


@pytest.mark.parametrize("half", [False, True])
def test_the_trace_is_what_a_real_pass_keeps(half: bool) -> None:
    """Of 400 tokens: so many that attention is fused on the CPU, too."""
    model = DiTConfig(**TINY | {"image_size": 20, "patch_size": 1})
    network = build_model(model, LEARNED)
    drop_gradients(network)
    x, time, conditions = random_inputs(model, 8, torch.device("cpu"))
    with LiveBytes([*network.parameters(), x, time]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = network(x, time, *conditions)
        output.square().mean().backward()
    assert activations(model, LEARNED, half=half, checkpointing=False).peak(8) == pytest.approx(
        max(live.history), rel=0.1
    )


class Alone(Processes):
    """One process, without a group of them."""

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_layer_that_goes_wrong_is_named(checkpoint: bool) -> None:
    network = perturbed(LABELLED).train()
    network.checkpoint_activations = checkpoint
    layer = dict(network.named_modules())["blocks.1.attention.proj"]
    layer.register_forward_hook(lambda _, __, output: output * torch.tensor([1.0, torch.nan, 1.0])[:, None, None])

    def recompute() -> Recomputed:
        losses = network(*inputs(LABELLED)).square().flatten(1).mean(dim=1)
        losses.mean().backward()
        return Recomputed(torch.tensor([3, 12, 37]), torch.arange(1000, 1003), losses.detach())

    alone = Alone(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    text = diagnose(network, recompute, [(n, p.detach()) for n, p in network.named_parameters()], alone)
    assert text == "layer blocks.1.attention.proj gave values that are not finite for t = 12 (images 1001)"


def test_the_roofline_has_all_of_its_products() -> None:
    model = DiTConfig(**TINY)
    assert sum(layer.flops for layer in layers_of(model, 2)) == 2 * count(model, LEARNED).forward_flops


# ---- training it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "stage"), [(1, 2), pytest.param(2, 3, marks=pytest.mark.prove)])
def test_it_trains_under_zero_and_resumes(dit_config: Path, tmp_path: Path, world: int, stage: int) -> None:
    """ZeRO 1 to 3; a run that stops half way goes on bit for bit, also where blocks are computed again."""
    more = ["model.num_classes=4", "model.null_class=true", "train.class_dropout=0.3", "model.dropout=0.1"]
    scenarios = [[f"run.folder={tmp_path / f's{s}'}", f"engine.zero_stage={s}", *more] for s in (1, 2, 3)]
    resumed = [f"run.folder={tmp_path / 'resumed'}", f"engine.zero_stage={stage}", *more]
    scenarios += [[*resumed, "train.budget_images=24"], [*resumed, "engine.activation_checkpointing=true"]]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"config": str(dit_config), "runs": scenarios}))
    run_ranks(["tests/trainer/train_scenarios.py", str(spec)], world)

    last = [list(read_train_records(tmp_path / name))[-1] for name in ("s1", "s2", "s3", "resumed")]
    assert [record.nimg for record in last] == [48] * 4
    assert (tmp_path / "resumed" / "metrics.24.jsonl").exists()  # it did resume, not start again
    for record in last[1:]:
        assert record.values["train/loss"] == pytest.approx(last[0].values["train/loss"], rel=1e-5)
    straight, again = (
        load_file(tmp_path / name / "exports" / f"{48:012d}" / "model.safetensors") for name in (f"s{stage}", "resumed")
    )
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert all(float(v.abs().max()) > 0 for name, v in straight.items() if name.endswith("modulation.weight"))


def test_its_export_is_evaluated_and_sampled(dit_config: Path, generated_data: Path, tmp_path: Path) -> None:
    stage = make_stage(dit_config, "model.num_classes=4", "model.null_class=true")
    export = make_export(tmp_path / "export", stage)
    request = EvalRequest(data=generated_data / "test", nll=NllSettings(num_calls=256))
    (nll,) = evaluate(export, request, progress=False)
    assert 3 < nll.value < 50
    trained = Stage(open_export(export).network("ema"), stage.config, SamplingConfig(respacing="5", guidance=2.0))
    images = sample(trained, range(3), labels=[0, 1, 2], seed=3)
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(images, sample(trained, range(3), labels=[0, 1, 2], seed=3))
    assert not torch.equal(images, sample(trained, range(3), labels=[0, 1, 3], seed=3))
