"""Schedules and respacing: the published constants, the defining curves, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from data_pipeline.errors import ConfigError
from trainer.config.diffusion import STEEPEST, DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.respacing import count_timesteps, space_timesteps
from trainer.diffusion.schedules import Schedule, cosine_betas, linear_betas, make_schedule, sigmoid_betas


def test_published_constants() -> None:
    cosine = make_schedule("cosine", 4000)
    assert int((cosine.betas == 0.999).sum()) == 1
    assert float(cosine.betas[0]) == pytest.approx(9.866e-6, rel=1e-3)
    assert float(cosine.alphas_cumprod[-1]) == pytest.approx(1.5e-10, rel=0.05)
    linear = make_schedule("linear", 4000)
    assert float(linear.alphas_cumprod[-1]) == pytest.approx(4.2e-5, rel=0.05)
    assert (linear_betas(1000)[0], linear_betas(1000)[-1]) == pytest.approx((1e-4, 0.02))


def test_linear_schedule_needs_more_than_twenty_steps() -> None:
    with pytest.raises(ConfigError, match="20"):
        linear_betas(20)
    assert linear_betas(21).max() < 1


def test_cosine_follows_its_defining_curve() -> None:
    t = np.arange(1, 100) / 100
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert np.cumprod(1 - cosine_betas(100))[:99] == pytest.approx(f, rel=1e-12)


@pytest.mark.parametrize(
    ("start", "end", "tau"), [(-3.0, 3.0, 1.0), (-3.0, 3.0, 0.5), (0.0, 3.0, 0.3), (-1.0, 2.0, 1.1)]
)
def test_sigmoid_follows_its_defining_curve(start: float, end: float, tau: float) -> None:
    """Chen 2023, algorithm 1, by scipy's sigmoid; the last step alone is bounded by its beta."""
    t = np.arange(1, 101) / 100
    v_start, v_end = expit(start / tau), expit(end / tau)
    gamma = (v_end - expit((start + (end - start) * t) / tau)) / (v_end - v_start)
    betas = sigmoid_betas(100, start=start, end=end, tau=tau)
    found = np.cumprod(1 - betas)
    assert found[:99] == pytest.approx(gamma[:99], rel=1e-9)
    assert found[99] == pytest.approx(gamma[98] * 1e-3, rel=1e-9)
    assert int((betas == 0.999).sum()) == 1
    assert betas.min() > 0


def test_sigmoid_by_hand() -> None:
    """sigmoid(3) = 0.95257413 and sigmoid(-1.5) = 0.18242552; the curve is symmetric about its middle."""
    first = (0.9525741268 - 0.1824255238) / (2 * 0.9525741268 - 1)
    found = np.cumprod(1 - sigmoid_betas(4))
    assert found == pytest.approx([first, 0.5, 1 - first, (1 - first) / 1000], rel=1e-8)
    config = DiffusionConfig(schedule="sigmoid", num_timesteps=100, sigmoid_tau=0.5)
    assert np.array_equal(GaussianDiffusion.create(config).schedule.betas, sigmoid_betas(100, tau=0.5))


@given(
    num_timesteps=st.integers(2, 5000), start=st.floats(-10, 10), width=st.floats(0.01, 10), tau=st.floats(0.01, 100)
)
def test_every_sigmoid_that_is_accepted_is_a_process(
    num_timesteps: int, start: float, width: float, tau: float
) -> None:
    tau = max(tau, max(abs(start), abs(start + width)) / (STEEPEST - 1e-9))
    config = DiffusionConfig(
        num_timesteps=num_timesteps, schedule="sigmoid", sigmoid_start=start, sigmoid_end=start + width, sigmoid_tau=tau
    )
    schedule = make_schedule.__wrapped__("sigmoid", num_timesteps, **config.schedule_shape)
    assert float(schedule.betas.min()) > 0
    assert all(bool(table.isfinite().all()) for table in vars(schedule).values() if isinstance(table, torch.Tensor))


def test_tables_are_float64_and_built_once() -> None:
    schedule = make_schedule("cosine", 123)
    assert schedule is make_schedule("cosine", 123)
    tables = [v for k, v in vars(schedule).items() if isinstance(v, torch.Tensor) and k != "timestep_map"]
    assert {(table.dtype, len(table)) for table in tables} == {(torch.float64, 123)}


@pytest.mark.parametrize("respacing", ["50", "10,15,20", "ddim50", "quadratic30", "1", "logsnr20", "karras20"])
def test_a_shorter_process_keeps_the_noise_levels_it_visits(respacing: str) -> None:
    whole, short = make_schedule("cosine", 4000), make_schedule("cosine", 4000, "cpu", respacing)
    steps = list(space_timesteps(4000, respacing, half_logsnr(whole)))
    assert torch.allclose(short.alphas_cumprod, whole.alphas_cumprod[steps], rtol=1e-12)
    assert short.timestep_map.tolist() == steps
    assert short.num_original == 4000
    for table in (short.betas, short.posterior_log_variance, short.posterior_mean_x0, short.fixed_large_log_variance):
        assert torch.isfinite(table).all()


def test_gather_takes_type_and_shape_of_what_it_multiplies() -> None:
    table, t = torch.arange(5, dtype=torch.float64), torch.tensor([3, 1])
    for like in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, dtype=torch.float64)):
        found = Schedule.gather(table, t, like)
        assert found.dtype == like.dtype
        assert found.shape == (2, *[1] * (like.ndim - 1))
        assert found.flatten().tolist() == [3, 1]


# ---- respacing --------------------------------------------------------------------------------------------------


def half_logsnr(schedule: Schedule) -> list[float]:
    return [schedule.level(step).half_logsnr for step in range(schedule.num_timesteps)]


def spaced(num_timesteps: int, respacing: str | int) -> tuple[int, ...]:
    """Of a process whose lambda falls evenly from 5 to -5; most forms do not ask."""
    return space_timesteps(num_timesteps, respacing, np.linspace(5, -5, num_timesteps).tolist())


def test_forms_of_respacing() -> None:
    assert spaced(300, "10,15,20")[:11] == (0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 100)
    assert len(spaced(300, "10,15,20")) == 45
    assert spaced(1000, "ddim50") == tuple(range(0, 1000, 20))
    assert spaced(4000, 5) == (0, 1000, 2000, 2999, 3999)
    assert spaced(4000, "quadratic10") == (0, 49, 197, 444, 789, 1234, 1777, 2419, 3159, 3999)
    assert spaced(10, "1") == (9,)
    assert spaced(11, "3,3,2") == (0, 2, 3, 4, 6, 7, 8, 10)  # halves round to even: 1.5 -> 2


@given(st.integers(2, 3000), st.data())
def test_every_form_gives_so_many_ascending_steps(num_timesteps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_timesteps))
    stride = data.draw(st.integers(1, num_timesteps))
    by_stride = len(range(0, num_timesteps, stride))
    forms = [f"{count}", f"quadratic{count}", f"logsnr{count}", f"karras{count}"]
    for text, length in (*((form, count) for form in forms), (f"ddim{by_stride}", by_stride)):
        steps = spaced(num_timesteps, text)
        assert len(steps) == length == count_timesteps(num_timesteps, text)
        assert list(steps) == sorted(set(steps))
        assert steps[0] >= 0
        assert steps[-1] < num_timesteps
        if not text.startswith("ddim"):
            assert steps[-1] == num_timesteps - 1  # a sampler starts from pure noise


@pytest.mark.parametrize(
    ("respacing", "what"),
    [("101", "101"), ("60,60", "50"), ("ddim99", "ddim50 or ddim100"), ("quadratic101", "100"), ("", "a number"),
     ("logsnr101", "'logsnr101': there are 100 steps; use logsnr100 or fewer"), ("karras101", "use karras100 or fewer"),
     ("logsnr0", "a number"), ("karras", "a number"),
     ("0", "a number"), ("-5", "a number"), ("ddim", "a number"), ("fast", "a number"), ("10,,5", "a number")],
)  # fmt: skip
def test_impossible_respacings_are_refused_with_a_remedy(respacing: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        spaced(100, respacing)
    with pytest.raises(ConfigError, match=what):
        count_timesteps(100, respacing)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("num_timesteps", [30, 1000, 4000])
@pytest.mark.parametrize("form", ["logsnr", "karras"])
def test_spacing_by_noise_gives_processes(form: str, num_timesteps: int, name: str) -> None:
    """Both ends are visited, and whatever the count the tables are those of a process."""
    for count in (1, 2, 3, 10, num_timesteps // 2, num_timesteps):
        short = make_schedule(name, num_timesteps, "cpu", f"{form}{count}")
        steps = short.timestep_map.tolist()
        assert len(steps) == count
        assert steps[-1] == num_timesteps - 1
        assert count == 1 or steps[0] == 0
        assert 0 < float(short.betas.min()) <= float(short.betas.max()) < 1
        assert all(bool(table.isfinite().all()) for table in vars(short).values() if isinstance(table, torch.Tensor))
    assert steps == list(range(num_timesteps))


@pytest.mark.parametrize(("form", "power"), [("logsnr", 0), ("karras", 1 / 7)])
def test_steps_are_spaced_by_their_noise(form: str, power: float) -> None:
    """By the very formulas, from sigma / alpha = 80 down; rounding to a step is all that is between."""
    whole = make_schedule("cosine", 4000)
    levels = np.exp(-np.array(half_logsnr(whole)))
    *steps, last = space_timesteps(4000, f"{form}20", half_logsnr(whole))
    assert last == 3999
    i = np.arange(19) / 18
    wanted = (levels[0] ** (1 - i) * 80.0**i) if not power else (levels[0] ** power * (1 - i) + 80.0**power * i) ** 7
    for step, sigma in zip(steps, wanted, strict=True):
        assert step == np.abs(np.log(levels / sigma)).argmin()
