"""Training objectives: what is minimised, what trains what, and the published conventions."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from gaussian_data import exact_output
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig, Quantity
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.objectives import Losses, classification_losses, part_names, training_losses

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def losses_of(
    config: DiffusionConfig, t: Tensor, output: Tensor | None = None
) -> tuple[Losses, Tensor, dict[str, Any]]:
    """(losses, the network's output, what else went in) in float64, by default of a random output."""
    process, generator = GaussianDiffusion.create(config), torch.Generator().manual_seed(0)
    x0 = torch.rand(len(t), 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x_t = process.q_sample(x0, t, noise)
    if output is None:
        shape = (len(t), 6 if config.learns_variance else 3, 4, 4)
        output = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = {"x0": x0, "x_t": x_t, "t": t, "noise": noise}
    return training_losses(process, config, output, **batch), output, batch


@pytest.mark.parametrize("kind", QUANTITIES)
def test_hybrid_trains_the_mean_by_the_mse_alone(kind: Quantity) -> None:
    config = DiffusionConfig(num_timesteps=100, vlb_weight=0.5, prediction=kind)
    losses, output, _ = losses_of(config, torch.tensor([0, 5, 50, 99]))
    torch.testing.assert_close(losses.loss, losses.parts["mse"] + 0.5 * losses.parts["vb"])
    (by_vb,) = torch.autograd.grad(losses.parts["vb"].sum(), output, retain_graph=True)
    assert float(by_vb[:, :3].abs().max()) == 0.0
    assert (by_vb[:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()
    (by_mse,) = torch.autograd.grad(losses.parts["mse"].sum(), output)
    assert float(by_mse[:, 3:].abs().max()) == 0.0


def test_vlb_objective_is_t_times_the_term_and_trains_the_mean_too() -> None:
    config = DiffusionConfig(num_timesteps=100, objective="vlb")
    losses, output, batch = losses_of(config, torch.tensor([3, 60]))
    process = GaussianDiffusion.create(config)
    prediction = process.predict(output, batch["x_t"], batch["t"], threshold=None)
    torch.testing.assert_close(losses.loss, 100 * process.vb_terms(prediction, batch["x0"], batch["x_t"], batch["t"]))
    (gradient,) = torch.autograd.grad(losses.loss.sum(), output)
    assert (gradient[:, :3].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_names_of_the_published_weights_of_the_bound() -> None:
    """rescaled: T * L_t / 1000 is added to the mse; unrescaled: L_t itself."""
    t = torch.tensor([1, 40, 99])
    for name, factor in (("rescaled", 100 / 1000), ("unrescaled", 1.0), (0.01, 1.0)):
        config = DiffusionConfig(num_timesteps=100, vlb_weight=name)  # type: ignore[arg-type]
        losses, _, _ = losses_of(config, t)
        torch.testing.assert_close(losses.loss - losses.parts["mse"], losses.parts["vb"] / 100 * factor)


@pytest.mark.parametrize("target", [None, *QUANTITIES])
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_mse_is_of_the_target_whatever_is_predicted(prediction: Quantity, target: Quantity | None) -> None:
    config = DiffusionConfig(
        num_timesteps=100, variance="fixed_small", objective="simple", prediction=prediction, mse_target=target
    )
    process, t = GaussianDiffusion.create(config), torch.tensor([2, 50, 90])
    _, _, batch = losses_of(config, t)
    guess = exact_output(process, prediction, batch["x_t"], t)  # some guess of x_0, said as a network would
    losses, _, _ = losses_of(config, t, guess)
    x0, eps = process.x0_and_eps(prediction, guess, batch["x_t"], t)
    alpha, sigma = process.signal_and_noise(t, x0)
    error = {
        "x0": x0 - batch["x0"],
        "eps": eps - batch["noise"],
        "v": alpha * (eps - batch["noise"]) - sigma * (x0 - batch["x0"]),
        "previous_mean": process.schedule.gather(process.schedule.posterior_mean_x0, t, x0) * (x0 - batch["x0"]),
    }[target or prediction]
    torch.testing.assert_close(losses.loss, error.square().mean(dim=(1, 2, 3)), rtol=1e-8, atol=1e-12)
    assert losses.parts.keys() == {"mse"}


def test_v_loss_weighs_x0_by_one_plus_snr() -> None:
    """Salimans & Ho 2022, section 4: the v-loss is the x_0-loss times 1 + alpha² / sigma²."""
    t = torch.tensor([10, 50, 90])
    both: list[Tensor] = []
    for target in ("v", "x0"):
        config = DiffusionConfig(
            num_timesteps=100, variance="fixed_small", objective="simple", prediction="v", mse_target=target
        )  # type: ignore[arg-type]
        losses, _, _ = losses_of(config, t)
        both.append(losses.loss)
    alphas_cumprod = GaussianDiffusion.create(DiffusionConfig(num_timesteps=100)).schedule.alphas_cumprod[t]
    torch.testing.assert_close(both[0], both[1] * (1 + alphas_cumprod / (1 - alphas_cumprod)))


def test_losses_of_a_classifier() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, 2.0, -1.0, -2.0]] * 4, requires_grad=True)
    losses = classification_losses(logits, torch.tensor([0, 3, 4, 5]))  # ranked first, second, fifth and last
    expected = torch.logsumexp(logits[0], 0) - logits[0, [0, 3, 4, 5]]
    torch.testing.assert_close(losses.loss, expected)
    torch.testing.assert_close(losses.parts["cross_entropy"], expected)
    assert losses.parts["accuracy"].tolist() == [1, 0, 0, 0]
    assert losses.parts["top5"].tolist() == [1, 1, 1, 0]
    (gradient,) = torch.autograd.grad(losses.loss.sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(dim=1) - torch.eye(6)[[0, 3, 4, 5]])
    assert classification_losses(logits[:, :4], torch.tensor([0, 1, 2, 3])).parts.keys() == {
        "cross_entropy",
        "accuracy",
    }


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_the_parts_are_those_that_are_named(objective: Any) -> None:
    variance: Any = "fixed_small" if objective == "simple" else "learned_range"
    config = DiffusionConfig(num_timesteps=100, variance=variance, objective=objective)
    losses, _, _ = losses_of(config, torch.tensor([0, 5, 50]))
    assert tuple(losses.parts) == part_names(config)
    for num_classes in (4, 5):
        config = DiffusionConfig(objective="cross_entropy")
        found = classification_losses(torch.randn(2, num_classes), torch.tensor([0, 1]))
        assert tuple(found.parts) == part_names(config, num_classes)


@pytest.mark.parametrize("objective", ["simple", "hybrid"])
@pytest.mark.parametrize("target", [None, *QUANTITIES])
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_min_snr_is_a_weight_of_the_x0_error_whatever_is_predicted(
    prediction: Quantity, target: Quantity | None, objective: Any
) -> None:
    """Hang et al. 2023: min(SNR, gamma) |x_0 - its prediction|², here with an SNR by hand from the betas."""
    config = DiffusionConfig(
        num_timesteps=100, objective=objective, prediction=prediction, mse_target=target, loss_weight="min_snr",
        variance="learned_range" if objective == "hybrid" else "fixed_small", min_snr_gamma=2.0,
    )  # fmt: skip
    t = torch.tensor([0, 2, 50, 90, 99])
    losses, output, batch = losses_of(config, t)
    process = GaussianDiffusion.create(config)
    error = process.predict(output, batch["x_t"], t, threshold=None).x0 - batch["x0"]
    kept = [float((1 - process.schedule.betas[: step + 1]).prod()) for step in t.tolist()]
    weights = torch.tensor([min(2.0, share / (1 - share)) for share in kept], dtype=torch.float64)
    assert (weights == 2.0).tolist() == [True, True, False, False, False]
    expected = weights * error.square().mean(dim=(1, 2, 3))
    by_vb = config.vlb_factor * losses.parts["vb"] if objective == "hybrid" else 0.0
    torch.testing.assert_close(losses.loss - by_vb, expected, rtol=1e-7, atol=1e-9)
    plain, _, _ = losses_of(config.model_copy(update={"loss_weight": "none"}), t)
    torch.testing.assert_close(losses.parts["mse"], plain.parts["mse"])  # what is logged does not depend on the weight


def test_min_snr_weights_of_the_paper() -> None:
    """min(SNR, 5) / SNR of the eps-loss, min(SNR, 5) / (SNR + 1) of the v-loss, by a network that is off by one."""
    t = torch.tensor([1, 10, 50, 99])
    kept = GaussianDiffusion.create(DiffusionConfig(num_timesteps=100)).schedule.alphas_cumprod[t]
    snr = kept / (1 - kept)
    capped = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    for kind, weight in (("eps", capped / snr), ("x0", capped), ("v", capped / (snr + 1))):
        config = DiffusionConfig(
            num_timesteps=100, variance="fixed_small", objective="simple", prediction=kind, loss_weight="min_snr"
        )  # type: ignore[arg-type]
        process = GaussianDiffusion.create(config)
        _, _, batch = losses_of(config, t)
        right = process.quantity(config.prediction, batch["x0"], batch["noise"], batch["x_t"], t)
        losses, _, _ = losses_of(config, t, right + 1)
        torch.testing.assert_close(losses.loss, weight)
