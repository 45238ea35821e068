"""The guarded optimizer: AdamW with clipping, unscaling and skipping, none of which looks at a figure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.config.engine import EngineConfig
from trainer.config.run import RunConfig, load_config
from trainer.config.train import TrainConfig
from trainer.optimizer import GuardedAdamW, LossScale, learning_rate
from trainer.run_folder import check_same_run

DEVICE = torch.device("cpu")


def make(grad_clip: float = 0.0, scale: LossScale | None = None) -> tuple[nn.Parameter, GuardedAdamW]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(50))
    optimizer = GuardedAdamW(
        [parameter], grad_clip=grad_clip, loss_scale=scale, device=DEVICE, lr=0.01, weight_decay=0.1
    )
    return parameter, optimizer


def fp16_scale(**settings: float) -> LossScale:
    scale = LossScale.create(EngineConfig(precision="fp16", **settings), DEVICE)  # type: ignore[arg-type]
    assert scale is not None
    return scale


def gradients(n: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(50, generator=generator) * 3 for _ in range(n)]


@pytest.mark.parametrize("grad_clip", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_adamw_with_the_norm_clipped(grad_clip: float, scaled: bool) -> None:
    parameter, optimizer = make(grad_clip, fp16_scale(loss_scale=1024.0) if scaled else None)
    reference = nn.Parameter(parameter.detach().clone())
    adamw = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1, fused=True)
    for gradient in gradients():
        parameter.grad = gradient * (1024.0 if scaled else 1.0)
        optimizer.step()
        reference.grad = gradient.clone()
        if grad_clip:
            nn.utils.clip_grad_norm_([reference], grad_clip)
        adamw.step()
        torch.testing.assert_close(optimizer.grad_norm, gradient.norm())
        assert optimizer.skipped == 0
    torch.testing.assert_close(parameter, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["gradient is nan", "gradient is inf", "loss is nan", "loss is inf", "told so"])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(what: str, grad_clip: float) -> None:
    parameter, optimizer = make(grad_clip)
    reference, same = make(grad_clip)
    first, second, third = gradients(3)

    def step(p: nn.Parameter, o: GuardedAdamW, gradient: Tensor) -> None:
        p.grad = gradient.clone()
        o.step()

    step(parameter, optimizer, first)
    bad = second.clone()
    if what.startswith("gradient"):
        bad[7] = math.nan if "nan" in what else math.inf
    if what.startswith("loss"):
        optimizer.watch_loss(torch.tensor(1.0))
        optimizer.watch_loss(torch.tensor(math.nan if "nan" in what else math.inf))
    if what == "told so":
        optimizer.skip()
    else:
        step(parameter, optimizer, bad)
    assert optimizer.skipped == 1
    assert optimizer.skips_in_a_row == 1
    assert not math.isfinite(optimizer.grad_norm)
    step(parameter, optimizer, third)
    assert optimizer.skipped == optimizer.skips_in_a_row == 0

    step(reference, same, first)
    step(reference, same, third)
    assert torch.equal(parameter, reference)
    for key, value in same.state[reference].items():
        assert torch.equal(optimizer.state[parameter][key], value), key


def test_the_loss_scale_falls_to_its_floor_where_skips_count_and_grows_again() -> None:
    scale = fp16_scale(loss_scale=8.0, loss_scale_floor=2.0, loss_scale_window=3)
    parameter, optimizer = make(scale=scale)
    bad = torch.full((50,), math.inf)
    seen = []
    for gradient in (bad, bad, bad, bad, *gradients(7)):
        parameter.grad = gradient.clone()
        optimizer.step()
        seen.append((float(scale.value), float(optimizer.skips_in_a_row)))
    assert seen[:4] == [(4.0, 0.0), (2.0, 0.0), (2.0, 1.0), (2.0, 2.0)]
    assert [value for value, _ in seen[4:]] == [2.0, 2.0, 4.0, 4.0, 4.0, 8.0, 8.0]
    assert all(count == 0 for _, count in seen[4:])
    assert scale.get() == (8.0, 1)
    other = fp16_scale()
    other.set(*scale.get())
    assert other.get() == (8.0, 1)


def test_only_fp16_has_a_scale() -> None:
    assert LossScale.create(EngineConfig(precision="bf16"), DEVICE) is None
    assert LossScale.create(EngineConfig(), DEVICE) is None


def test_the_norm_is_of_all_processes_gradients() -> None:
    parameter, optimizer = make(grad_clip=1.0)
    optimizer.sum_squares_with(lambda squares: 4 * squares)  # three others with the same
    gradient = gradients(1)[0]
    parameter.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, 2 * gradient.norm())


# ---- the learning rate ---------------------------------------------------------------------------------------------


def rates(**settings: object) -> list[float]:
    config = TrainConfig.model_validate({"global_batch": 10, "lr": 0.5, "budget_images": 100} | settings)
    return [learning_rate(config, nimg, 100) for nimg in range(0, 100, 10)]


def test_the_rate_is_constant_or_falls_to_zero_after_the_last_step() -> None:
    assert rates() == [0.5] * 10
    assert rates(warmup_images=20) == [0.25, *[0.5] * 9]
    # Dhariwal & Nichol's classifiers: lr * (1 - step / steps)
    assert rates(lr_decay="linear") == pytest.approx([0.5 * (1 - step / 10) for step in range(10)])
    assert rates(lr_decay="linear", warmup_images=20) == pytest.approx(
        [0.25, *(0.5 * (1 - s / 10) for s in range(1, 10))]
    )


def test_a_budget_that_the_rate_falls_towards_is_kept(tiny_config: Path) -> None:
    def config(budget: int, decay: str) -> RunConfig:
        return load_config(tiny_config, [f"train.budget_images={budget}", f"train.lr_decay={decay}"])

    check_same_run(config(40, "none"), config(80, "none"), Path("run"))
    check_same_run(config(40, "linear"), config(40, "linear"), Path("run"))
    with pytest.raises(ConfigError, match=r"train\.budget_images: 40 -> 80"):
        check_same_run(config(40, "linear"), config(80, "linear"), Path("run"))
