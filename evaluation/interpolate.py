"""From one real image to another, through the latents of a network.

    python -m evaluation.interpolate RUN/exports/000064000000 --data data/cifar10/test --pairs 3,8 0,7 --out between.png
    python -m evaluation.interpolate EXPORT --data SPLIT --pairs 3,8 --depths 0.125,0.25,0.5,0.75,1 --out depths.png
    python -m evaluation.interpolate EXPORT --data SPLIT --pairs 3,8 --encoder ddim --respacing 100 --out arc.png

A row a pair of images (numbers in the split) and depth. `--encoder noise` (Ho et al. 2020, section 4.4): both are
noised to the share --depths of the process, the line between the two x_t is cut at --columns places, and each is
brought back by the sampler, all with the same noise. `--encoder ddim` (Song et al. 2021, section 5.3): both are
inverted, the arc between the two latents is cut, and DDIM without noise brings each back. A network that hears classes
is told that of the nearer image. Beside the picture lies an npz with all its images, `arr_0` uint8 [N, H, W, 3] row by
row. Without noise of its own (--sampler ddim, the default) the way back is DDIM's; `--sampler ancestral` is that of the
paper.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.progress import progress_bar
from evaluation.base_stage import open_base_stage
from evaluation.device import pick_device
from evaluation.report.figures import save_figure
from evaluation.report.image_rows import draw_rows
from evaluation.sample_files import write_npz
from evaluation.sampling_options import add_network_options, network_sampling_of
from evaluation.subject import check_data
from trainer.diffusion.interpolation import lerp, slerp
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import to_uint8
from trainer.diffusion.samplers.inversion import ddim_inversion
from trainer.guiding import guiding_classes
from trainer.models import IMAGE_CHANNELS
from trainer.sample_noise import SampleNoise
from trainer.sampling import Stage, predictor_of, run_sampler

Images = NDArray[np.uint8]  # [n, H, W, 3]
# At the very end of the cosine schedule alpha is 1e-5: there an error in eps is 1e5 times as large in x_0, and no
# inversion comes back.
DEPTHS = {"noise": "0.5", "ddim": "0.9"}


@dataclass(frozen=True)
class Ends:
    """Two images of a data split."""

    numbers: tuple[int, int]
    images: Tensor  # [2, C, H, W] in [-1, 1]
    labels: tuple[int, int]

    def nearer(self, weights: Tensor) -> list[int]:
        """The class of the nearer end at each weight [n]."""
        return [self.labels[int(weight > 0.5)] for weight in weights.tolist()]


class Interpolation:
    """A network that is led from one image to another."""

    def __init__(self, stage: Stage, device: torch.device, *, columns: int, encoder: str, seed: int) -> None:
        """`columns`: images of a row, the two ends among them; `encoder`: noise or ddim."""
        self.stage, self.device, self.encoder, self.seed = stage, device, encoder, seed
        self.weights = torch.linspace(0, 1, columns, dtype=torch.float64)

    def row(self, ends: Ends, depth: float) -> Images:
        """The images [columns, H, W, 3] between two, by latents at this share of the process, above 0 to 1."""
        middle = self._part(ends, self.weights, depth)
        noise = self._noise([ends.numbers[0]] * len(self.weights), stage=0)  # one for the whole row
        if self.encoder == "ddim":
            inverse = replace(self._part(ends, torch.tensor([0.0, 1.0]), depth), threshold=None)
            a, b = ddim_inversion(inverse, ends.images)
            x = slerp(a, b, self.weights)
            middle = replace(middle, threshold=None)
        else:
            first = self._noise(list(ends.numbers), stage=1)()
            t = torch.full((2,), middle.diffusion.num_timesteps - 1, device=self.device)
            a, b = middle.diffusion.q_sample(ends.images, t, first)
            x = lerp(a, b, self.weights)
        images = run_sampler(self.stage.sampling, middle, x, noise)
        pixels: Images = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        return pixels

    def time(self, depth: float) -> int:
        """The t of the network's own process at which a depth's latents are."""
        schedule = predictor_of(self.stage, [0]).diffusion.schedule
        return int(schedule.timestep_map[self._num_steps(schedule.num_timesteps, depth) - 1])

    def _part(self, ends: Ends, weights: Tensor, depth: float) -> Predictor:
        """The network on the lowest part of its process."""
        hears = self.stage.config.model.num_classes or guiding_classes(self.stage.sampling)
        labels = ends.nearer(weights) if hears else None
        predictor = predictor_of(self.stage, [0] * len(weights), labels=labels, device=self.device)
        return replace(
            predictor, diffusion=predictor.diffusion.first(self._num_steps(predictor.diffusion.num_timesteps, depth))
        )

    @staticmethod
    def _num_steps(total: int, depth: float) -> int:
        return max(1, round(depth * total))

    def _noise(self, seeds: list[int], *, stage: int) -> SampleNoise:
        size = self.stage.config.model.image_size
        return SampleNoise(seeds, (IMAGE_CHANNELS, size, size), seed=self.seed, stage=stage, device=self.device)


def read_ends(dataset: ShardDataset, pair: str, device: torch.device) -> Ends:
    """The images of `3,8`. Raises UserError for what is no pair of numbers of the split's images."""
    words = pair.split(",")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--pairs {pair}: two numbers of images are expected, such as 3,8.")
    first, second = (int(word) for word in words)
    if max(first, second) >= len(dataset):
        raise UserError(f"--pairs {pair}: {dataset.place} has the images 0 to {len(dataset) - 1}.")
    images, labels = dataset.read(np.array([first, second]))
    x0 = torch.from_numpy(images).to(device).float() / 127.5 - 1
    return Ends((first, second), x0, (int(labels[0]), int(labels[1])))


def read_depths(text: str) -> list[float]:
    """`0.25,0.5,1` as shares of the process. Raises UserError for anything else."""
    try:
        depths = [float(word) for word in text.split(",")]
    except ValueError:
        depths = []
    if not depths or not all(0 < depth <= 1 for depth in depths):
        raise UserError(f"--depths {text}: shares of the process are expected, above 0 to 1, such as 0.25,0.5,1.")
    return depths


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.interpolate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("export", type=Path, help="RUN/exports/<images seen>, of a base network")
    add("--data", required=True, help="the data split that the images are of, or its URL")
    add("--pairs", nargs="+", default=["0,1"], help="numbers of two images each")
    add("--columns", type=int, default=9, help="images between and with the two ends")
    add("--encoder", choices=("noise", "ddim"), default="noise")
    add("--depths", help=f"shares of the process (default: {DEPTHS['noise']} for noise, {DEPTHS['ddim']} for ddim)")
    add("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    add("--seed", type=int, default=0)
    add("--num-threads", type=int, help="CPU threads")
    add("--out", type=Path, required=True, help="the picture, a .png; the images go to an .npz beside it")
    add_network_options(parser.add_argument_group("sampling"), sampler="ddim", respacing="100")
    return parser.parse_args()


def _check_undone(a: argparse.Namespace) -> None:
    """Raises UserError for what would not lead the way back that inversion came."""
    for option, value, needed in (
        ("--sampler", a.sampler, "ddim"), ("--eta", a.eta, 0.0), ("--corrector-steps", a.corrector_steps, 0),
        ("--threshold", a.threshold, "static"),
    ):  # fmt: skip
        if value != needed:
            raise UserError(
                f"{option} {value}: --encoder ddim is undone by DDIM without noise, corrector or bounds; leave it out."
            )


def main() -> int:
    """The command line."""
    a = _parse()
    if a.columns < 2:
        raise UserError(f"--columns {a.columns} is too small: the two ends are among them; use 2 or more.")
    if a.out.suffix != ".png":
        raise UserError(f"--out {a.out} must end in .png.")
    if a.encoder == "ddim":
        _check_undone(a)
    depths = read_depths(a.depths or DEPTHS[a.encoder])
    device = pick_device(a.num_threads)
    export, stage = open_base_stage(a.export, network_sampling_of(a), weights=a.weights, device=device)
    dataset = ShardDataset(a.data)
    check_data(export.config, dataset)
    ends = [read_ends(dataset, pair, device) for pair in a.pairs]
    interpolation = Interpolation(stage, device, columns=a.columns, encoder=a.encoder, seed=a.seed)
    rows, sides = [], []
    work = [(pair, depth) for pair in ends for depth in depths]
    for pair, depth in progress_bar(work, total=len(work), unit="row", description="interpolating"):
        real = (pair.images.permute(0, 2, 3, 1).cpu().numpy() * 127.5 + 127.5).round().astype(np.uint8)
        rows.append(np.concatenate([real[:1], interpolation.row(pair, depth), real[1:]]))
        sides.append(f"{pair.numbers[0]}, {pair.numbers[1]}\nt = {interpolation.time(depth)}")
    _write(a.out, np.stack(rows), sides, f"{export.config.name}, {export.info['nimg']:,} images seen")
    return 0


def _write(out: Path, images: Images, sides: list[str], title: str) -> None:
    """The picture, with the real images in frames at its sides, and the npz."""
    columns, size = images.shape[1], images.shape[2]
    heads = ["real", *(f"{weight:.2g}" for weight in np.linspace(0, 1, columns - 2)), "real"]
    out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_rows(images, heads=heads, sides=sides, title=title, marked=(0, columns - 1)), out)
    flat = images.reshape(-1, size, size, 3)
    write_npz(out.with_suffix(".npz"), [flat], num=len(flat), image_size=size, labels=None, scratch=out.parent)
    print(f"{out}, {out.with_suffix('.npz')}")


if __name__ == "__main__":
    run_cli(main)
