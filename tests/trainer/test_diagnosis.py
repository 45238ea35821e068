"""What is said of a step that is not finite, for faults planted at known places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import UNetConfig
from trainer.diagnosis import Recomputed, diagnose
from trainer.models import build_model
from trainer.processes import Processes

MODEL = UNetConfig(
    image_size=8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_heads=2
)  # fmt: skip


class Others(Processes):
    """This process is rank 0; rank 1 says what it is told to."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.other] if self.world_size > 1 else [value]

    other = ""


def processes(world_size: int = 1) -> Others:
    return Others(rank=0, world_size=world_size, local_rank=0, device=torch.device("cpu"))


class BadBackward(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.nan


def network(checkpoint: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = build_model(MODEL, DiffusionConfig(), checkpoint_activations=checkpoint)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def diagnosis(net: nn.Module, x: Tensor | None = None, *, on: Processes | None = None, loss_of: Any = None) -> str:
    inputs = torch.randn(4, 3, 8, 8) if x is None else x

    def recompute() -> Recomputed:
        output = net(inputs, torch.arange(4.0))
        losses = output.square().flatten(1).mean(dim=1)
        losses = losses if loss_of is None else loss_of(losses)
        losses.mean().backward()
        return Recomputed(torch.tensor([3, 12, 37, 5]), torch.arange(1000, 1004), losses.detach())

    return diagnose(net, recompute, [(n, p.detach()) for n, p in net.named_parameters()], on or processes())


def layer_named(net: nn.Module, kind: type[nn.Module], number: int) -> tuple[str, nn.Module]:
    return [(name, module) for name, module in net.named_modules() if isinstance(module, kind)][number]


def test_a_weight_comes_first() -> None:
    net = network()
    name = [n for n, _ in net.named_parameters()][7]
    with torch.no_grad():
        dict(net.named_parameters())[name].view(-1)[0] = torch.inf
    assert diagnosis(net) == f"the weights themselves are not finite: {name}"


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_first_layer_forward_is_named_with_the_images(checkpoint: bool) -> None:
    net = network(checkpoint)
    name, layer = layer_named(net, nn.Conv2d, 5)

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        rows = torch.tensor([False, True, True, False]).view(4, *[1] * (output.dim() - 1))
        return torch.where(rows, torch.inf, output)

    layer.register_forward_hook(spoil)
    expected = f"layer {name} gave values that are not finite for t = 12, 37 (images 1001, 1002)"
    assert diagnosis(net) == expected


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_first_layer_backward_is_named(checkpoint: bool) -> None:
    net = network(checkpoint)
    name, layer = layer_named(net, nn.Conv2d, 5)
    layer.register_forward_hook(lambda _, inputs, output: BadBackward.apply(output))
    text = diagnosis(net)
    assert "finite forward" in text
    assert f"the gradient of the weight {name}." in text or f"layer {name} hands back" in text


def test_a_layer_whose_own_backward_is_at_fault_is_named_and_not_its_neighbour() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return BadBackward.apply(x)  # type: ignore[no-any-return]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.Identity(), Bad()

        def forward(self, x: Tensor, _: Tensor) -> Tensor:
            return self.good(x) + self.bad(x) + self.good(x)  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Conv2d(3, 3, 1), Residual()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.block(self.first(x), t)  # type: ignore[no-any-return]

    assert "the gradient that layer block.bad hands back to its input is not finite" in diagnosis(Net())


def test_inputs_and_losses_have_their_own_words() -> None:
    x = torch.randn(4, 3, 8, 8)
    x[3] = torch.nan
    assert diagnosis(network(), x) == "what enters the network is not finite for t = 5 (images 1003)"
    only_first = torch.tensor([torch.nan, 1.0, 1.0, 1.0])
    assert diagnosis(network(), loss_of=lambda losses: losses * only_first) == (
        "all layers gave finite values, but the loss is not finite for t = 3 (images 1000)"
    )


def test_the_first_process_with_something_to_say_is_named() -> None:
    two = processes(world_size=2)
    object.__setattr__(two, "other", "layer x gave values that are not finite")
    assert diagnosis(network(), on=two) == "process 1: layer x gave values that are not finite"


def test_nothing_found_is_said_and_no_hook_is_left() -> None:
    net = network()
    assert "all values" in diagnosis(net)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._backward_hooks for p in net.parameters())


@pytest.mark.parametrize("stages", ["3", pytest.param("0 1 2", marks=pytest.mark.prove)])
def test_under_the_engine_at_every_zero_stage(tiny_config: Path, tmp_path: Path, stages: str) -> None:
    """Two processes, the fault on one of them; its images are named."""
    command = ["tests/trainer/diagnosis_ranks.py", str(tiny_config), str(tmp_path / "run"), *stages.split()]
    assert run_ranks(command, world_size=2).count("checked") == 2
