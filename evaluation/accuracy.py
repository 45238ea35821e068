"""How often a classifier of noisy images is right: over uniform t, and by ranges of t.

Call i of N looks at one image, noised to one t. Each image comes equally often (to one), and each of N equal parts of
the timesteps once, so a value's standard error, which is that of independent calls, errs on the wide side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator, normal
from data_pipeline.dataset import ShardDataset
from data_pipeline.files import write_atomic
from evaluation.chunks import Advance, Arrays, Chunks, concatenated, cut
from evaluation.quality import Measured
from evaluation.report.accuracy_figure import draw_accuracy
from evaluation.report.figures import save_figure
from evaluation.subject import Subject
from trainer.diffusion.objectives import classification_losses

BATCH = 128  # noisy images a network call
NUM_RANGES = 20  # of t, equally long
# What the metric "accuracy" gives: the records' names by those of `Losses.parts`.
RECORDS = {"accuracy": "accuracy", "top5": "top5_accuracy", "cross_entropy": "cross_entropy"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Calls:
    """What is looked at, each [N]."""

    image: NDArray[np.int64]  # number in the split
    t: NDArray[np.int64]

    @classmethod
    def draw(cls, num_images: int, num_timesteps: int, num_calls: int, *, seed: int) -> Calls:
        """`num_calls` of them, as a function of the seed."""
        rng = generator(seed, Stream.ACCURACY_PLAN, 0)
        passes = -(-num_calls // num_images)
        image = np.concatenate([rng.permutation(num_images) for _ in range(passes)])[:num_calls]
        u = (rng.permutation(num_calls) + rng.random(num_calls)) / num_calls
        return cls(image, np.minimum((u * num_timesteps).astype(np.int64), num_timesteps - 1))


@dataclass(frozen=True)
class Accuracy:
    """What a classifier said, call by call."""

    t: NDArray[np.int64]  # [N]
    parts: dict[str, Array]  # by the names of `Losses.parts`, each [N]
    num_timesteps: int

    def over_all(self) -> dict[str, Measured]:
        """Each part's mean over uniform t, with its standard error; in the details those by quarter of t."""
        quarter = self.t * 4 // self.num_timesteps
        return {
            name: Measured(
                float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5),
                {f"q{q}": float(values[quarter == q].mean()) for q in range(4) if (quarter == q).any()},
            )
            for name, values in self.parts.items()
        }  # fmt: skip

    @cached_property
    def by_t(self) -> dict[str, Array]:
        """`edges` [R + 1] of ranges of t, `count` [R], and each part's mean and standard error [R]; NaN: none there."""
        num = min(NUM_RANGES, self.num_timesteps)
        edges = np.linspace(0, self.num_timesteps, num + 1).round()
        cell = np.searchsorted(edges, self.t, side="right") - 1
        count = np.bincount(cell, minlength=num).astype(np.float64)
        found = {"edges": edges, "count": count}
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, values in self.parts.items():
                mean = np.bincount(cell, weights=values, minlength=num) / count
                square = np.bincount(cell, weights=(values - mean[cell]) ** 2, minlength=num) / (count - 1)
                found |= {name: mean, f"{name}_stderr": np.sqrt(square / count)}
        return found

    def write_artifacts(self, folder: Path) -> None:
        """Write `accuracy_per_t.npz` and `.png`."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.by_t)  # type: ignore[arg-type]
        write_atomic(folder / "accuracy_per_t.npz", buffer.getvalue())
        save_figure(draw_accuracy(self.by_t), folder / "accuracy_per_t.png")


def measure_accuracy(
    subject: Subject, dataset: ShardDataset, num_calls: int | None, *, seed: int, chunks: Chunks, title: str = ""
) -> Accuracy:
    """Ask a classifier about `num_calls` noisy images, by default as many as the split has.

    Raises FinishedElsewhere as `Chunks.results` does.
    """
    diffusion = subject.diffusion()
    calls = Calls.draw(len(dataset), diffusion.num_timesteps, num_calls or len(dataset), seed=seed)
    parts = cut(len(calls.t), BATCH)

    @torch.inference_mode()
    def make(number: int, advance: Advance) -> Arrays:
        part = parts[number]
        images, labels = dataset.read(calls.image[part])
        x0 = torch.from_numpy(images).to(subject.device).float() / 127.5 - 1
        noise = normal(seed, Stream.ACCURACY_NOISE, part.start, len(x0), x0.shape[1:])
        t = torch.from_numpy(calls.t[part]).to(subject.device)
        x_t = diffusion.q_sample(x0, t, torch.from_numpy(noise).to(subject.device))
        logits = subject.network(x_t, diffusion.network_time(t)).float()
        found = classification_losses(logits, torch.from_numpy(labels).to(subject.device)).parts
        advance(len(x0))
        return {name: values.double().cpu().numpy() for name, values in found.items()}

    found = chunks.results(
        "accuracy",
        len(parts),
        make,
        work=lambda n: parts[n].stop - parts[n].start,
        unit="call",
        title=title,
        final=True,
    )
    return Accuracy(calls.t, concatenated(found), diffusion.num_timesteps)
