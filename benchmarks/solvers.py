"""How fast the samplers converge: `python -m benchmarks.solvers`.

On Gaussian data with correlated pixels and its exact denoiser (`correlated_data`), in float64, where the map of every
sampler is known exactly and so is what it should be: no sampling error. Two things are measured against network calls.

- On a smooth grid, between lambda = log(alpha / sigma) = -4 and 4, evenly spaced: the error of the map, against the
  probability-flow ODE's, of solvers without noise; of those with noise, the error of the covariance that they arrive
  with from the exact law at -4 (their weak order). The slope is the order.
- On the cosine schedule of 4000 steps, spaced by `logsnr`, from N(0, I) to the image: the error of the covariance of
  what is sampled, with all that the ends add.

Errors are Frobenius norms of differences, relative to what should be. A second on a CPU core for each sampler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.correlated_data import (
    COVARIANCE,
    DIM,
    affine_map,
    exact_denoiser,
    exact_flow,
    marginal,
    predictor_of,
    process_at,
)
from benchmarks.unet_step import machine
from data_pipeline.errors import run_cli
from data_pipeline.files import write_json
from evaluation.report.chart import Chart, Panel, Series, log_axis
from evaluation.report.figures import draw, save_figure
from evaluation.report.text_table import Table
from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS

Grid = Callable[[float, float, int], NDArray[np.float64]]  # (first, last, number) -> lambdas

CONFIG = DiffusionConfig(num_timesteps=4000, variance="fixed_small", objective="simple", rescale_timesteps=False)
NOISIEST, CLEANEST = -4.0, 4.0  # lambda
SMOOTH_STEPS = (8, 16, 32, 64, 128, 256)
IMAGE_STEPS = (8, 12, 16, 24, 32, 48, 64, 100, 150, 250)
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Contestant:
    """A sampler with its options, and the order that its authors give it."""

    name: str
    order: int
    colour: str
    eta: float | None = None
    stochastic: bool = False
    width: float = 1.4  # of its line: of two that are the same sampler, both are to be seen

    @property
    def label(self) -> str:
        return self.name if self.eta is None else f"{self.name}, eta {self.eta:g}"

    @property
    def options(self) -> dict[str, float]:
        return {} if self.eta is None else {"eta": self.eta}


CONTESTANTS = (
    Contestant("ancestral", 1, "#8a5a2b", stochastic=True, width=4.0),
    Contestant("ddim", 1, "#6b6b6b", eta=0.0, width=4.0),
    Contestant("ddim", 1, "#c9a227", eta=1.0, stochastic=True),
    Contestant("euler", 1, "#9bc1e6"),
    Contestant("heun", 2, "#2c5aa0"),
    Contestant("dpmpp_2m", 2, "#c0392b"),
    Contestant("dpmpp_2s", 2, "#d98200"),
    Contestant("dpmpp_2m_sde", 2, "#b0399a", stochastic=True),
)


def on_smooth_grid(contestant: Contestant, num_steps: int, grid: Grid = np.linspace) -> tuple[int, float]:
    """Network calls and error of a sampler from lambda = -4 to 4: of its map, or if it has noise of the covariance.

    It is stopped at 4, before the step to the image, over which no order is defined.
    """
    lambdas = torch.tensor([CLEANEST + 1, *grid(CLEANEST, NOISIEST, num_steps + 1)], dtype=torch.float64)
    process = process_at(lambdas, CONFIG)
    here, there = process.schedule.level(num_steps + 1), process.schedule.level(1)
    predictor = Predictor(exact_denoiser(CONFIG, process), process, threshold=None)
    found, exact = affine_map(contestant.name, predictor, stop=1, **contestant.options), exact_flow(here, there)
    calls = SAMPLERS[contestant.name].num_calls(process.schedule, stop=1)
    if contestant.stochastic:
        return calls, _distance(found.law(*marginal(here))[1], marginal(there)[1])
    return calls, _distance(found.matrix, exact.matrix)


def to_the_image(contestant: Contestant, num_steps: int) -> tuple[int, float]:
    """Network calls of a sampler on the cosine schedule, and the error of the covariance of its images."""
    predictor = predictor_of(CONFIG, f"logsnr{num_steps}")
    found = affine_map(contestant.name, predictor, **contestant.options)
    covariance = found.law(torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64))[1]
    return SAMPLERS[contestant.name].num_calls(predictor.diffusion.schedule), _distance(covariance, COVARIANCE)


def order_of(points: Sequence[tuple[int, float]]) -> float:
    """The slope of log error against log calls, negated: by least squares."""
    calls, errors = np.log(np.array(points, dtype=np.float64)).T
    return -float(np.polyfit(calls, errors, 1)[0])


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measure(contestant: Contestant) -> dict[str, Any]:
    """A contestant's two curves, and the order over the last three points of the first."""
    smooth = [on_smooth_grid(contestant, n) for n in SMOOTH_STEPS]
    return {
        "sampler": contestant.label,
        "published_order": contestant.order,
        "measured": "covariance" if contestant.stochastic else "map",
        "order": order_of(smooth[-3:]),
        "smooth": smooth,
        "image": [to_the_image(contestant, n) for n in IMAGE_STEPS],
    }


def chart(rows: Sequence[dict[str, Any]]) -> Chart:
    """Error against network calls: on the smooth grid, and to the image."""
    titles = {"smooth": "evenly spaced, lambda = -4 to 4", "image": "cosine schedule, logsnr, to the image"}
    return Chart(
        "", (tuple(_panel(rows, key, titles[key]) for key in titles),), size=(10.5, 4.4), sizes_title="sampler"
    )


def _panel(rows: Sequence[dict[str, Any]], key: str, title: str) -> Panel:
    series = []
    for contestant, row in zip(CONTESTANTS, rows, strict=True):
        calls, errors = zip(*row[key], strict=True)
        series.append(
            Series(
                calls, errors, contestant.colour, label=contestant.label, legend="sizes", width=contestant.width,
                marker="dot", dash="dash" if contestant.stochastic else "solid",
            )
        )  # fmt: skip
    x = log_axis("network calls", [value for one in series for value in one.x])
    y = log_axis("relative error", [value for one in series for value in one.y], ticks="power")
    return Panel(x, y, tuple(series), title=title)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "solvers_cpu.json", help="a figure (.png) comes with it")
    out = parser.parse_args().out
    rows = [measure(contestant) for contestant in CONTESTANTS]
    write_json(out, {"machine": machine(torch.device("cpu")), "rows": rows})
    save_figure(draw(chart(rows)), out.with_suffix(".png"))
    table = Table(["sampler", "measured", "order", "published"], [
        [row["sampler"], row["measured"], f"{row['order']:.2f}", str(row["published_order"])] for row in rows
    ], left=(0, 1))  # fmt: skip
    print(table)
    return 0


if __name__ == "__main__":
    run_cli(main)
