"""Do the intervals of the likelihood estimate cover, and what does it save? `python -m benchmarks.nll EXPORT`.

A table L[image, t, noise] of a trained network is computed once: every timestep of some held-out images, with a few
noises each. Its mean over noises and images, summed over t, is then a truth that is known exactly, and plans by the
thousand can be drawn from it without the network. Asked is how often the 95 % interval holds the truth, and how many
network calls a sweep over all timesteps takes for the same standard error of a large split's mean.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.unet_step import machine
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.progress import progress_bar
from evaluation.chunks import Chunks, concatenated
from evaluation.device import pick_device
from evaluation.nll.plan import Plan, sweep_images, sweep_plan
from evaluation.nll.rounds import Drawn, bound, draw
from evaluation.nll.settings import NllSettings
from evaluation.nll.summary import Mean
from evaluation.nll.terms import NetworkTerms, Terms
from evaluation.subject import open_subject


@dataclass(frozen=True)
class Table:
    """L_t of every image, timestep and noise in bits/dim: [images, T, noises], and L_T [images]."""

    bits: NDArray[np.float32]
    prior: NDArray[np.float32]

    @property
    def by_image(self) -> NDArray[np.float64]:
        """Each image's bound, its noises averaged: [images]."""
        bound: NDArray[np.float64] = self.bits.mean(axis=2, dtype=np.float64).sum(axis=1) + self.prior
        return bound

    @property
    def sweep_noise(self) -> float:
        """Variance of an image's bound over the noises of one sweep, one noise a timestep."""
        return float(self.bits.var(axis=2, ddof=1, dtype=np.float64).sum(axis=1).mean())

    def look(self, plan: Plan, kind: str, final: bool, *, seed: int) -> Terms:
        """What the calls of a plan see, each with one of its image's noises."""
        rng = np.random.default_rng([seed, len(kind), plan.noise_start])
        noise = rng.integers(self.bits.shape[2], size=len(plan))
        nothing = np.zeros(len(plan), dtype=np.float32)
        return Terms(self.bits[plan.image, plan.t, noise], self.prior[plan.image], nothing, nothing)


def estimate(table: Table, settings: NllSettings, seed: int) -> tuple[Drawn, Mean]:
    """The estimator, with the table in the network's place."""
    num_images, num_timesteps, _ = table.bits.shape
    drawn = draw(
        [partial(table.look, seed=seed)], settings, num_timesteps, num_images, seed=seed,
        stderr=lambda d: bound(d, num_images).stderr or 0.0,
    )  # fmt: skip
    return drawn, bound(drawn, num_images)


@dataclass(frozen=True)
class Calibration:
    """Many estimates of one truth."""

    num_plans: int
    num_calls: float  # a plan, on average, with the pilot
    truth: float  # bits/dim
    mean: float  # of the estimates
    deviation: float  # their standard deviation
    mean_stderr: float  # root mean square of what they say it is
    coverage: float  # share of 95 % intervals that hold the truth

    @property
    def bias_in_stderrs(self) -> float:
        """The mean's distance from the truth, in standard errors of the mean."""
        return float((self.mean - self.truth) / (self.deviation / np.sqrt(self.num_plans)))


def calibrate(table: Table, settings: NllSettings, num_plans: int, *, progress: bool = False) -> Calibration:
    """Draw plans number 0 .. num_plans - 1 (their seeds) from the table."""
    truth = float(table.by_image.mean())
    values, errors, calls, covered = [], [], [], 0
    for seed in progress_bar(range(num_plans), total=num_plans, unit="plan", description="plans", disable=not progress):
        drawn, mean = estimate(table, settings, seed)
        assert mean.interval95 is not None
        assert mean.stderr is not None
        covered += mean.interval95[0] <= truth <= mean.interval95[1]
        values.append(mean.value)
        errors.append(mean.stderr)
        calls.append(len(drawn.plan) + drawn.num_pilot)
    return Calibration(
        num_plans, float(np.mean(calls)), truth, float(np.mean(values)), float(np.std(values, ddof=1)),
        float(np.sqrt(np.mean(np.square(errors)))), covered / num_plans,
    )  # fmt: skip


@dataclass(frozen=True)
class Saving:
    """Network calls for one standard error of the mean of a large split, of which all images looked at are a part."""

    stderr: float  # of one plan there: its timesteps and noises, and the images that its calls reach
    image_deviation: float  # between images, of the bound
    sweep_noise_deviation: float  # of an image's bound, with one noise a timestep
    calls: float  # of a plan, with the pilot
    calls_full_sweep: float  # T for each of (images' variance + noise's) / stderr^2 images

    @property
    def ratio(self) -> float:
        return self.calls_full_sweep / self.calls


def saving(table: Table, settings: NllSettings, found: Calibration) -> Saving:
    """What the plans of `found` save against full sweeps over as many images as give the same standard error.

    On the table's few images the plans' deviation is all time and noise. On a split of many, each of their calls is on
    another image (but second visits), which adds the images' variance, as the table's images show it.
    """
    num_timesteps = table.bits.shape[1]
    many = 100 * settings.num_calls
    plan = draw(
        [lambda plan, kind, final: _nothing(len(plan))], settings, num_timesteps, many, seed=0, stderr=lambda d: 0.0
    ).plan  # fmt: skip
    visits = np.unique(plan.image, return_counts=True)[1]
    images = float(table.by_image.var(ddof=1))
    variance = found.deviation**2 + images * float(np.square(visits / len(plan)).sum())
    noise = table.sweep_noise
    sweeps = (images + noise) / variance
    return Saving(
        float(np.sqrt(variance)), float(np.sqrt(images)), float(np.sqrt(noise)), found.num_calls, num_timesteps * sweeps
    )


def _nothing(num_calls: int) -> Terms:
    zeros = np.zeros(num_calls, dtype=np.float32)
    return Terms(zeros, zeros, zeros, zeros)


def measure_table(export: Path, data: Path, num_images: int, num_noises: int, folder: Path) -> Table:
    """Ask the network for the whole table; what `folder` already holds is not asked for again."""
    subject, dataset = open_subject(export, device=pick_device()), ShardDataset(data)
    subject.check_data(dataset)
    if num_images > len(dataset):
        raise UserError(f"--num-images {num_images}: {data} has {len(dataset):,} images.")
    diffusion = subject.diffusion()
    images = sweep_images(len(dataset), num_images, seed=0)
    shape = (num_images, diffusion.num_timesteps)
    chunks, bits = Chunks(folder / f"{subject.sha256[:16]}-{dataset.manifest.fingerprint[:16]}"), []
    for noise in range(num_noises):
        look = NetworkTerms(
            subject.condition, diffusion, dataset, 0, subject.device, True, chunks,
            f"noise {noise + 1} of {num_noises}",
        )  # fmt: skip
        plan_of = partial(_sweep_plan, images, diffusion.num_timesteps, noise)
        terms = concatenated(look.stream(num_images, plan_of, f"noise{noise}"))
        bits.append(terms["bits"].reshape(shape))
    return Table(np.stack(bits, axis=2), terms["prior"].reshape(shape)[:, 0])


def _sweep_plan(images: NDArray[np.int64], num_timesteps: int, noise: int, number: int) -> Plan:
    return sweep_plan(
        int(images[number]), num_timesteps, noise_start=(noise * len(images) + number) * num_timesteps
    )  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("export", type=Path, help="RUN/exports/<images seen>")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10/test"), help="held-out images")
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--num-noises", type=int, default=2, help="of every image at every timestep")
    parser.add_argument("--num-plans", type=int, default=4000)
    parser.add_argument("--num-calls", type=int, default=2048, help="of a plan")
    parser.add_argument("--table", type=Path, default=Path("build/nll_table"), help="folder for the table's chunks")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    if a.num_images < 2 or a.num_noises < 2:
        raise UserError("--num-images and --num-noises: at least 2 of each, for their variances.")
    settings = NllSettings(num_calls=a.num_calls)
    settings.check()
    table = measure_table(a.export, a.data, a.num_images, a.num_noises, a.table)
    found = calibrate(table, settings, a.num_plans, progress=True)
    saved = saving(table, settings, found)
    print(f"truth {found.truth:.4f} bits/dim, mean of {found.num_plans:,} estimates {found.mean:.4f}")
    print(f"({found.bias_in_stderrs:+.1f} standard errors of that mean)")
    print(f"standard deviation {found.deviation:.4f}, said to be {found.mean_stderr:.4f}")
    print(f"95 % intervals that hold the truth: {found.coverage:.1%}")
    print(f"standard error on a large split {saved.stderr:.4f} for {saved.calls:,.0f} calls; full sweeps need")
    print(f"{saved.calls_full_sweep:,.0f} for the same, {saved.ratio:,.0f} times as many")
    if a.json:
        rows: dict[str, Any] = vars(found) | {"bias_in_stderrs": found.bias_in_stderrs}
        write_json(
            a.json,
            {"machine": machine(pick_device()), "calibration": rows, "saving": vars(saved) | {"ratio": saved.ratio}},
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
