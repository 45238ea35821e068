"""Between two latents, and processes that begin half-way."""

from __future__ import annotations

import pytest
import torch

from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.interpolation import lerp, slerp
from trainer.diffusion.thresholding import static

WEIGHTS = torch.linspace(0, 1, 5, dtype=torch.float64)


def two_latents() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()


@pytest.mark.parametrize("between", [lerp, slerp])
def test_the_ends_are_the_two_latents(between: object) -> None:
    a, b = two_latents()
    path = between(a, b, WEIGHTS)  # type: ignore[operator]
    assert path.shape == (5, 3, 8, 8)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path[1], between(b, a, WEIGHTS)[3])  # type: ignore[operator]


def test_the_arc_keeps_its_radius_and_goes_at_an_even_pace() -> None:
    a, b = two_latents()
    b = b * a.norm() / b.norm()
    path = slerp(a, b, WEIGHTS).flatten(1)
    torch.testing.assert_close(path.norm(dim=1), a.norm().expand(5))
    cosines = torch.cosine_similarity(path[:-1], path[1:])
    torch.testing.assert_close(cosines, cosines[:1].expand(4))


def test_the_arc_between_parallel_latents_is_the_line() -> None:
    a, _ = two_latents()
    torch.testing.assert_close(slerp(a, 2 * a, WEIGHTS), lerp(a, 2 * a, WEIGHTS))


@pytest.mark.parametrize("respacing", [None, "10"])
def test_the_first_steps_of_a_process_are_a_process(respacing: str | None) -> None:
    """Its tables are those that would be built for these steps."""
    config = DiffusionConfig(num_timesteps=100)
    whole = GaussianDiffusion.create(config, "cpu", respacing)
    first = whole.first(7)
    assert first.num_timesteps == 7
    assert first.schedule.num_original == 100  # so the network hears the same times
    assert (first.schedule is first.trained) == (respacing is None)
    t = torch.arange(7)
    x0, noise = torch.randn(2, 7, 3, 4, 4)
    torch.testing.assert_close(first.network_time(t), whole.network_time(t))
    x_t = first.q_sample(x0, t, noise)
    assert torch.equal(x_t, whole.q_sample(x0, t, noise))
    output = torch.randn(7, 6, 4, 4)
    for found, expected in zip(
        vars(first.predict(output, x_t, t, threshold=static)).values(),
        vars(whole.predict(output, x_t, t, threshold=static)).values(),
        strict=True,
    ):
        assert torch.equal(found, expected)
