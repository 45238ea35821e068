"""Progressive generation: what a network knows of its images on the way to them (Ho et al. 2020, section 4.3).

    python -m evaluation.progressive RUN/exports/000064000000 --num 8 --out progressive
    python -m evaluation.progressive RUN/exports/000064000000 --share 6 --out progressive --respacing 250
    python -m evaluation.progressive RUN/exports/000064000000 --num 2048 --data data/cifar10/test --out progressive

Into the folder --out:

  x0.png         a row a sample: the x_0 predicted at --columns moments of the reverse process (their figure 6)
  shared.png     with --share N: rows of N images that have x_t in common, from late to early t (their figure 7)
  quality.png    with --data: the distance of the predicted x_0 to real images, moment by moment (their figure 10);
                 quality.json holds the numbers

Sample i is that of `evaluation.sample` with the same options.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.progress import progress_bar
from evaluation.base_stage import open_base_stage
from evaluation.device import pick_device
from evaluation.features import get_feature_net
from evaluation.features.feature_set import feature_arrays, gather
from evaluation.features.reference import reference_features
from evaluation.quality import quality, record_name
from evaluation.report.figures import draw, save_figure
from evaluation.report.image_rows import draw_rows
from evaluation.report.progressive_chart import progressive_chart
from evaluation.sampling_options import add_network_options, network_sampling_of
from evaluation.subject import check_data
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.progressive import Recorder, evenly
from trainer.diffusion.samplers import to_uint8
from trainer.guiding import samples_said
from trainer.models import IMAGE_CHANNELS
from trainer.sample_noise import SampleNoise
from trainer.sampling import Stage, no_progress, predictor_of, run_sampler

MAX_ROWS = 12  # of the picture
SHARED_ROWS = 4  # moments of which images are shown that share x_t
Images = NDArray[np.uint8]  # [n, H, W, 3]


class Progressive:
    """A network's samples, with what it predicted on the way to them."""

    def __init__(self, stage: Stage, device: torch.device, *, columns: int, seed: int) -> None:
        """`columns`: moments that are looked at, evenly spaced over the steps."""
        self.stage, self.device, self.seed = stage, device, seed
        schedule = predictor_of(stage, [0]).diffusion.schedule
        self.steps = evenly(schedule.num_timesteps, min(columns, schedule.num_timesteps))
        self.times = [int(schedule.timestep_map[step]) for step in self.steps]  # of the network's own process

    def recorded(self, numbers: range, steps: tuple[int, ...], *, progress: bool = False) -> Recorder:
        """The images of these numbers, sampled, with x_t and the predicted x_0 at the steps."""
        noise = self._noise(list(numbers), stage=0)
        with progress_bar(total=self.stage.num_calls, unit="call", description="sampling", disable=not progress) as bar:
            tell = bar.update if progress else no_progress
            predictor = predictor_of(self.stage, numbers, device=self.device, progress=tell)
            recorder = Recorder(**vars(predictor), steps=frozenset(steps))
            run_sampler(self.stage.sampling, recorder, noise(), noise)
        return recorder

    def predictions(self, numbers: range, *, progress: bool = False) -> Images:
        """The x_0 predicted for the images of these numbers: [n, columns, H, W, 3]."""
        x0 = self.recorded(numbers, self.steps, progress=progress).x0
        return np.stack([_pixels(x0[step]) for step in self.steps], axis=1)

    def sharing(self, number: int, num: int) -> tuple[Images, list[int]]:
        """Images [moments, num, H, W, 3] that go on from one sample's x_t with noise of their own, and the t of each.

        Late moments first: those images share the most.
        """
        num_steps = predictor_of(self.stage, [0]).diffusion.num_timesteps
        steps = tuple(sorted(set(evenly(num_steps, SHARED_ROWS + 1)[:-1])))
        x = self.recorded(range(number, number + 1), steps).x
        predictor = predictor_of(self.stage, [number] * num, device=self.device)
        rows, times = [], []
        for step in steps:
            rest = replace(predictor, diffusion=predictor.diffusion.first(step + 1))
            noise = self._noise(list(range(num)), stage=1)  # another family: not that which led to x_t
            noise()
            rows.append(_pixels(run_sampler(self.stage.sampling, rest, x[step].expand(num, -1, -1, -1), noise)))
            times.append(int(predictor.diffusion.schedule.timestep_map[step]))
        return np.stack(rows), times

    def _noise(self, seeds: list[int], *, stage: int) -> SampleNoise:
        size = self.stage.config.model.image_size
        return SampleNoise(seeds, (IMAGE_CHANNELS, size, size), seed=self.seed, stage=stage, device=self.device)


def _pixels(images: Tensor) -> Images:
    """[n, C, H, W] in [-1, 1] to uint8 [n, H, W, C] on the host."""
    pixels: Images = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def quality_by_time(
    predictions: Images, dataset: ShardDataset, *, feature_net: str, weights: Path | None, num_reference: int | None,
    device: torch.device,
) -> tuple[str, list[float]]:  # fmt: skip
    """The Fréchet distance of each column of [n, columns, H, W, 3] to real images, with the metric's name."""
    net = get_feature_net(feature_net, device=str(device), weights=weights)
    reference = reference_features(dataset, net, num=num_reference, with_rows=False, title="features of real images")
    values = []
    for column in progress_bar(
        range(predictions.shape[1]), total=None, unit="moment", description="features of predictions"
    ):
        images = torch.from_numpy(np.ascontiguousarray(predictions[:, column])).permute(0, 3, 1, 2)
        parts = (feature_arrays(net(batch)) for batch in images.split(256))
        features = gather(net, parts, data="", num=len(images), folder=None, with_rows=False)
        values.append(quality(features, reference, ("fd",), device=str(device))["fd"].value)
    return record_name("fd", feature_net), values


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.progressive", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("export", type=Path, help="RUN/exports/<images seen>, of a base network")
    add("--num", type=int, default=8, help="samples; the picture shows the first ones")
    add("--columns", type=int, default=10, help="moments of the reverse process")
    add("--share", type=int, default=0, help="also draw so many images that share x_t")
    add("--data", help="a data split to compare the predicted x_0 with")
    add("--num-reference", type=int, help="real images to compare with (default: the whole split)")
    add("--feature-net", default="efflite0", help="efflite0 or inception")
    add("--feature-weights", type=Path, help="the feature net's weights file")
    add("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=64, help="samples a network call")
    add("--num-threads", type=int, help="CPU threads")
    add("--out", type=Path, required=True, help="folder of the pictures")
    add_network_options(parser.add_argument_group("sampling"), sampler="ancestral", respacing="100")
    return parser.parse_args()


def _check(a: argparse.Namespace) -> None:
    for name, least in (("num", 1), ("columns", 2), ("share", 0), ("seed", 0), ("batch", 1), ("num_threads", 1)):
        value = getattr(a, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small; use {least} or more.")
    if a.data is not None and a.num < 2:
        raise UserError(f"--num {a.num}: a distance is of two samples or more, and says little of less than 1,000.")


def _check_shared(sampling: SamplingConfig) -> None:
    """Raises UserError for samplers that always go on from x_t in the same way."""
    noisy = sampling.sampler in ("ancestral", "dpmpp_2m_sde") or sampling.eta > 0 or sampling.corrector_steps > 0
    if not noisy:
        raise UserError(
            f"--share: sampler={sampling.sampler} draws no noise, and images with x_t in common would be the same; "
            "use --sampler ancestral, dpmpp_2m_sde, or ddim with --eta 1."
        )


def main() -> int:
    """The command line."""
    a = _parse()
    _check(a)
    device, sampling = pick_device(a.num_threads), network_sampling_of(a)
    if a.share:
        _check_shared(sampling)
    export, stage = open_base_stage(a.export, sampling, weights=a.weights, device=device)
    dataset = None if a.data is None else ShardDataset(a.data)
    if dataset is not None:
        check_data(export.config, dataset)
    progressive = Progressive(stage, device, columns=a.columns, seed=a.seed)
    starts = range(0, a.num, a.batch)
    parts = [progressive.predictions(range(s, min(s + a.batch, a.num)), progress=True) for s in starts]
    predictions, heads = np.concatenate(parts), [f"t = {t}" for t in progressive.times]
    a.out.mkdir(parents=True, exist_ok=True)
    name = f"{export.config.name}, {export.info['nimg']:,} images seen"
    rows = draw_rows(predictions[:MAX_ROWS], heads=heads, title=f"Predicted x_0, {name}")
    save_figure(rows, a.out / "x0.png")
    if a.share:
        images, times = progressive.sharing(0, a.share)
        shared = draw_rows(images, sides=[f"t = {t}" for t in times], title=f"Images with x_t in common, {name}")
        save_figure(shared, a.out / "shared.png")
    if dataset is not None:
        metric, values = quality_by_time(
            predictions, dataset, feature_net=a.feature_net, weights=a.feature_weights,
            num_reference=a.num_reference, device=device,
        )  # fmt: skip
        save_figure(
            draw(progressive_chart(progressive.times, values, metric=metric, title=name)), a.out / "quality.png"
        )
        points = [{"t": t, metric: value} for t, value in zip(progressive.times, values, strict=True)]
        write_json(a.out / "quality.json", {"num": a.num, "sampling": samples_said(stage.sampling), "points": points})
    print(a.out)
    return 0


if __name__ == "__main__":
    run_cli(main)
