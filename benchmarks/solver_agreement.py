"""Our solvers against diffusers' schedulers: `python -m benchmarks.solver_agreement`.

Both start from the same x_T, visit the same steps, draw the same noise and ask the same network, which is the exact
denoiser of a mixture of eight images with noise: not linear, so a step that went elsewhere would show. Every sampler
runs on the linear and the cosine schedule of 1000 steps, on several respacings with even and odd numbers of steps, for
a network that predicts eps, x_0 and v, with and without a bound on x_0.

diffusers keeps its tables in float32, where 1 - alphas_cumprod has lost four digits at the first steps. It is run both
so, as shipped, and with our tables in their place, in float64. Its Euler and Heun work on x / alpha in float32: they
start at the first step whose sigma / alpha is 80 or less, since above it that costs digits (and our Heun is Euler's
method there). Printed are the largest distances between both results, in float32, and of each from our float64 result,
all relative to the latter's largest value.

Needs diffusers: pip install -e '.[bench]'. Twenty seconds on a CPU core.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.peers import INSTALL_DIFFUSERS
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from evaluation.report.text_table import Table
from trainer.config.diffusion import DiffusionConfig, Quantity
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.respacing import LARGEST_SIGMA
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.thresholding import Threshold, dynamic, static

Tables = Literal["shipped", "our"]
SHAPE = (16, 3, 4, 4)  # x
SPREAD = 0.1  # of the images around the eight
THEIR_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
RESPACINGS = ("10", "15", "50", "logsnr20", "karras21")
BOUNDS: dict[str, Threshold | None] = {"none": None, "static": static, "dynamic": dynamic(0.9)}


@dataclass(frozen=True)
class Case:
    """One process, how its network's output is to be read, and what bounds x_0."""

    schedule: Any
    respacing: str
    prediction: Quantity
    bound: str

    @property
    def config(self) -> DiffusionConfig:
        return DiffusionConfig(
            num_timesteps=1000, schedule=self.schedule, prediction=self.prediction, variance="fixed_small",
            objective="simple", rescale_timesteps=False,
        )  # fmt: skip

    def process(self, largest_sigma: float) -> GaussianDiffusion:
        """The visited steps whose sigma / alpha is not above."""
        whole = GaussianDiffusion.create(self.config, respacing=self.respacing)
        levels = [whole.schedule.level(step) for step in range(whole.num_timesteps)]
        return whole.first(sum(level.scaled_sigma <= largest_sigma for level in levels))


@dataclass(frozen=True)
class Pair:
    """A sampler of ours, and the scheduler of theirs that is to do the same."""

    ours: str
    scheduler: str
    settings: dict[str, Any]
    options: dict[str, Any]
    bounds: tuple[str, ...]  # those that theirs knows
    scaled: bool = False  # theirs is of x / alpha
    largest_sigma: float = float("inf")  # where to start


PAIRS = (
    Pair("dpmpp_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, {}, ("none", "dynamic")),
    Pair("dpmpp_2s", "DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}, {}, ("none", "dynamic")),
    Pair("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, ("none", "dynamic")),
    Pair("ddim", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
         {"eta": 1.0}, ("none", "dynamic")),
    Pair("ancestral", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, {},
         ("none", "dynamic")),
    Pair("euler", "EulerDiscreteScheduler", {}, {}, ("none",), scaled=True, largest_sigma=LARGEST_SIGMA),
    Pair("heun", "HeunDiscreteScheduler", {}, {}, ("none", "static"), scaled=True, largest_sigma=LARGEST_SIGMA),
)  # fmt: skip


def cases(pair: Pair) -> Iterator[Case]:
    """Every combination that both know."""
    for words in itertools.product(("linear", "cosine"), RESPACINGS, THEIR_NAMES, pair.bounds):
        yield Case(*words)  # type: ignore[arg-type]


def mixture_denoiser(case: Case) -> Denoiser:
    """The exact network of images around eight given ones, computed in float64 and told in the type of x."""
    whole = GaussianDiffusion.create(case.config)
    centres = torch.rand(8, *SHAPE[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        x_t, t = x.double(), time.long()
        alpha, sigma = whole.signal_and_noise(t, x_t)
        variance = alpha**2 * SPREAD**2 + sigma**2
        away = x_t[:, None] - alpha[:, None] * centres  # [B, 8, C, H, W]
        share = torch.softmax(-(away**2 / (2 * variance[:, None])).sum(dim=(2, 3, 4)), dim=1)
        each = centres + (alpha * SPREAD**2 / variance)[:, None] * away
        x0 = (share[:, :, None, None, None] * each).sum(dim=1)
        return whole.quantity(case.prediction, x0, (x_t - alpha * x0) / sigma, x_t, t).to(x.dtype)

    return denoiser


def our_images(pair: Pair, process: GaussianDiffusion, case: Case, x: Tensor, noises: list[Tensor]) -> Tensor:
    """What our sampler makes of x."""
    predictor = Predictor(mixture_denoiser(case), process, BOUNDS[case.bound])
    return SAMPLERS[pair.ours](predictor, x, noise=iter(noises).__next__, **pair.options)


def their_images(
    pair: Pair, process: GaussianDiffusion, case: Case, x: Tensor, noises: list[Tensor], tables: Tables
) -> Tensor:
    """What their scheduler makes of it: the usual loop of a pipeline."""
    denoiser, noise, scheduler = mixture_denoiser(case), iter(noises), their_scheduler(pair, process, case, tables)
    if pair.scaled:
        x = x / process.schedule.level(process.num_timesteps - 1).alpha
    for t in scheduler.timesteps:
        told = scheduler.scale_model_input(x, t) if pair.scaled else x
        output = denoiser(told, torch.full((len(x),), int(t)).float())
        drawn = {"variance_noise": next(noise)} if "sde" in pair.settings.get("algorithm_type", "") else {}
        x = scheduler.step(output, t, x, **drawn).prev_sample
    return x


def their_scheduler(pair: Pair, process: GaussianDiffusion, case: Case, tables: Tables) -> Any:
    """Their scheduler, to visit the steps of our process. Raises UserError where diffusers is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"diffusers cannot be imported ({error}); install it with: {INSTALL_DIFFUSERS}") from error
    settings: dict[str, Any] = {
        "num_train_timesteps": 1000, "trained_betas": GaussianDiffusion.create(case.config).schedule.betas.numpy(),
        "prediction_type": THEIR_NAMES[case.prediction],
    }  # fmt: skip
    if pair.scheduler.startswith("DPMSolver"):
        settings |= {"final_sigmas_type": "zero", "lower_order_final": True, "solver_order": 2}
    if case.bound == "dynamic":
        settings |= {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e9}
    if case.bound == "static":
        settings |= {"clip_sample": True}
    scheduler = getattr(diffusers, pair.scheduler)(**settings | pair.settings)
    scheduler.set_timesteps(timesteps=process.schedule.timestep_map.flip(0).tolist())
    if tables == "our":
        levels = [process.schedule.level(step).scaled_sigma for step in range(process.num_timesteps)]
        sigmas = torch.tensor([*reversed(levels), 0.0], dtype=torch.float64)
        twice = len(scheduler.sigmas) > len(sigmas)  # Heun's: once for each of its calls
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]]) if twice else sigmas
    return scheduler


def distances(pair: Pair, case: Case) -> dict[str, float]:
    """How far apart the results are, relative to the largest value of our float64 one."""
    process, generator = case.process(pair.largest_sigma), torch.Generator().manual_seed(0)
    x, *noises = (torch.randn(SHAPE, generator=generator) for _ in range(process.num_timesteps + 1))
    exact = our_images(pair, process, case, x.double(), [noise.double() for noise in noises])
    ours = our_images(pair, process, case, x, noises)
    shipped, theirs = (their_images(pair, process, case, x, noises, tables) for tables in ("shipped", "our"))

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / exact.abs().max())

    return {
        "apart, shipped tables": apart(ours, shipped), "apart, our tables": apart(ours, theirs),
        "ours from float64": apart(ours, exact), "theirs from float64": apart(theirs, exact),
    }  # fmt: skip


def compare(pair: Pair) -> dict[str, Any]:
    """The largest distances of a pair over all cases."""
    found = [distances(pair, case) for case in cases(pair)]
    worst = {name: max(each[name] for each in found) for name in found[0]}
    names = {"sampler": pair.ours, **pair.options, "scheduler": pair.scheduler, **pair.settings}
    return names | {"cases": len(found), "distances": worst}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    a = parser.parse_args()
    rows = [compare(pair) for pair in PAIRS]
    columns = list(rows[0]["distances"])
    cells = [
        [row["sampler"], row["scheduler"], str(row["cases"]), *(f"{row['distances'][name]:.1e}" for name in columns)]
        for row in rows
    ]
    print(Table(["sampler", "scheduler", "cases", *columns], cells, left=(0, 1)))
    if a.json is not None:
        import diffusers

        write_json(a.json, {"diffusers": diffusers.__version__, "torch": torch.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    run_cli(main)
