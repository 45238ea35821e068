"""Power-function averages: their lengths, their weights in closed form, and others made of them afterwards."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.averages.fit import Stored, fit_exponential, fit_power, inner, power_weights, step_weights
from trainer.averages.rules import SIGMA_REL_BOUND, Exponential, PowerProfile, sigma_rel_of
from trainer.averages.sharded import ShardedEma
from trainer.config.run import load_config
from trainer.engine import Fragment

LENGTHS = (0.01, 0.05, 0.1, 0.2, 0.28)
TRACKED = (PowerProfile(0.05), PowerProfile(0.1))


def stored(num: int, steps: int) -> list[Stored]:
    return [Stored(profile, steps * (n + 1) // num) for n in range(num) for profile in TRACKED]


# ---- one profile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_gamma_is_the_root_of_the_cubic(sigma_rel: float) -> None:
    gamma = PowerProfile(sigma_rel).gamma
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    assert gamma == pytest.approx(max(roots.real), rel=1e-9)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-14)


def test_published_exponents_and_the_longest_profile() -> None:
    assert [round(p.gamma, 2) for p in TRACKED] == [16.97, 6.94]  # Karras et al. 2024, section 3
    assert sigma_rel_of(0.0) == pytest.approx(SIGMA_REL_BOUND, rel=1e-15)
    assert PowerProfile(math.nextafter(SIGMA_REL_BOUND, 0)).gamma == pytest.approx(0, abs=1e-7)
    assert PowerProfile(1e-4).gamma > 9990


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_the_decays_make_the_integral_of_the_power(sigma_rel: float) -> None:
    """The product of the decays is the closed form, which is tau^gamma integrated over each step."""
    profile, steps = PowerProfile(sigma_rel), 3000
    weights = power_weights(profile, steps)
    np.testing.assert_allclose(step_weights(profile, steps), weights, rtol=1e-9, atol=1e-300)
    assert weights.sum() == pytest.approx(1, abs=1e-14)  # the initial weights count nothing
    at = (np.arange(steps) + 0.5) / steps
    mean = weights @ at
    assert np.sqrt(weights @ (at - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-4)  # what the length is of


def test_weights_of_a_constant_decay() -> None:
    weights = step_weights(Exponential(0.9), 50)
    assert weights[-1] == pytest.approx(1 - 50 / 59)  # it is still young
    kept = math.prod(min(0.9, (1 + s) / (10 + s)) for s in range(50))
    assert weights.sum() == pytest.approx(1 - kept, rel=1e-12)


@pytest.mark.parametrize("times", [(100.0, 100.0), (40.0, 100.0), (100.0, 7.0)])
@pytest.mark.parametrize("gammas", [(16.97, 6.94), (0.5, 30.0)])
def test_inner_products_are_the_integrals(gammas: tuple[float, float], times: tuple[float, float]) -> None:
    end = min(times)
    nodes, node_weights = np.polynomial.legendre.leggauss(64)
    tau = (nodes + 1) / 2 * end
    values = [(g + 1) / t * (tau / t) ** g for g, t in zip(gammas, times, strict=True)]
    numeric = float(node_weights @ (values[0] * values[1])) * end / 2
    args = [np.float64(x) for pair in zip(gammas, times, strict=True) for x in pair]
    assert inner(*args) == pytest.approx(numeric, rel=1e-6)


# ---- others made of them ----------------------------------------------------------------------------------------


def dense(weights: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    return np.pad(weights, (0, length - len(weights)))


@pytest.mark.parametrize("target", [PowerProfile(0.07), PowerProfile(0.15), Exponential(0.995)], ids=str)
def test_the_error_is_the_distance_of_the_profiles(target: PowerProfile | Exponential) -> None:
    """Both in steps; the fit's own is of the integrals, which differ by what a profile changes within a step."""
    steps = 4096
    snapshots = stored(8, steps)
    if isinstance(target, PowerProfile):
        fit = fit_power(snapshots, target, steps)
    else:
        fit = fit_exponential(snapshots, target, steps)
    wanted = step_weights(target, steps)
    bases = np.array([dense(power_weights(s.profile, s.step), steps) for s in snapshots])
    distance = np.linalg.norm(fit.factors @ bases - wanted) / np.linalg.norm(wanted)
    assert fit.error == pytest.approx(distance, rel=0.01)
    best = np.linalg.lstsq(bases.T, wanted, rcond=None)[0]
    assert fit.factors.sum() == pytest.approx(1, abs=1e-12)
    assert fit.error <= 1.02 * np.linalg.norm(best @ bases - wanted) / np.linalg.norm(wanted)


def test_a_stored_average_is_itself_and_more_snapshots_come_closer() -> None:
    snapshots = stored(16, 1024)
    fit = fit_power(snapshots, TRACKED[1], 1024)
    assert fit.error < 1e-7
    expected = [float(s == Stored(TRACKED[1], 1024)) for s in snapshots]
    np.testing.assert_allclose(fit.factors, expected, atol=1e-9)
    errors = [fit_power(stored(num, 1024), PowerProfile(0.07), 1024).error for num in (4, 8, 16, 32)]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors))


def trajectory(steps: int) -> list[Tensor]:
    """The weights of a small network after each step of Adam on noisy data."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator, history = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(32, 4, generator=generator)
        loss = (network(x) - (x[:, :1] * x[:, 1:2]).sin() - 0.5 * torch.randn(32, 1, generator=generator)).square()
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
        history.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    return history


def test_averages_made_afterwards_are_those_tracked_from_the_start() -> None:
    """On a network that is trained; the error is relative to the distance between average and weights."""
    steps, wanted = 1024, (PowerProfile(0.03), PowerProfile(0.07), PowerProfile(0.15))
    history = trajectory(steps)
    live = torch.zeros_like(history[0])
    ema = ShardedEma([Fragment("w", 0, live, {})], {p.name: p for p in (*TRACKED, *wanted)})
    kept: dict[Stored, Tensor] = {}
    for step, weights in enumerate(history):
        live.copy_(weights)
        ema.update(step)
        kept |= {Stored(p, step + 1): ema.shadows[p.name][0].double().clone() for p in TRACKED}

    def error(num: int, target: PowerProfile) -> float:
        snapshots = stored(num, steps)
        fit = fit_power(snapshots, target, steps)
        made = sum(f * kept[s] for f, s in zip(fit.factors.tolist(), snapshots, strict=True))
        tracked = ema.shadows[target.name][0].double()
        return float((made - tracked).norm() / (live.double() - tracked).norm())

    errors = {target: [error(num, target) for num in (8, 32, 128)] for target in wanted}
    for target, (few, some, many) in errors.items():
        assert some < few / 3, target
        assert many < some / 3, target
        assert many < 1e-3, target


# ---- the config -------------------------------------------------------------------------------------------------


def test_averages_have_their_names(tiny_config: Path) -> None:
    train = load_config(tiny_config, ["train.ema_profiles=[0.05,0.10]", "train.extra_ema_decays=[0.99]"]).train
    assert list(train.averages) == ["ema", "ema_0.99", "power_0.05", "power_0.1"]
    assert train.profiles == {"power_0.05": PowerProfile(0.05), "power_0.1": PowerProfile(0.1)}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.ema_profiles=[0.3]", r"ema_profiles=\[0\.3\].*below 1/sqrt\(12\) = 0\.2887"),
        ("train.ema_profiles=[0.0]", r"above 0"),
        ("train.ema_profiles=[0.05,0.05]", r"different relative lengths"),
        ("train.ema_snapshot_every_images=8", r"ema_snapshot_every_images=8.*set train\.ema_profiles=\[0\.05,0\.1\]"),
    ],
)
def test_impossible_profiles_are_refused(tiny_config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(tiny_config, [override])
