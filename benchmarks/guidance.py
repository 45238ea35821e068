"""What a classifier's guidance does to the samples of a real network, as a figure and a table.

    python -m benchmarks.guidance EXPORT CLASSIFIER --data data/cifar10 --scales 0,1,4,10 --out guided.png

Image i is asked for class i modulo all, from the same noise at every scale. How often the images show their class is
judged by another net: a ridge regression on EfficientNet-Lite0's features of labelled training images, itself judged on
held-out ones. The guiding classifier's own opinion of the finished images stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import run_cli
from data_pipeline.files import write_json
from evaluation.device import pick_device
from evaluation.features import get_feature_net
from evaluation.features.feature_set import spread
from evaluation.report.figures import save_figure
from evaluation.report.image_rows import draw_rows
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.export import open_export
from trainer.sampling import Stage, sample

RIDGE = 1e-2  # of the features' mean square
BATCH = 20
Judge = Callable[[Tensor], Tensor]  # uint8 [N, 3, H, W] -> classes [N]


@dataclass(frozen=True)
class Row:
    """What was seen at one scale."""

    scale: float
    shown: float  # share of images in which the judge sees the class asked for
    stderr: float
    classifiers_own: float  # mean probability that the guiding classifier gives it in the finished images


def make_judge(data: Path, num_train: int, num_test: int) -> tuple[Judge, float]:
    """A judge of images, and the share of held-out ones whose class it names."""
    net = get_feature_net("efflite0")

    def features(images: Tensor) -> Tensor:
        pooled = torch.cat([net(part).pool for part in images.split(64)]).double()
        return torch.cat([pooled, torch.ones(len(pooled), 1, dtype=torch.float64)], dim=1)  # [N, D + 1]

    x, y = (torch.from_numpy(a) for a in _some(ShardDataset(data / "train"), num_train))
    rows = features(x)
    penalty = RIDGE * rows.square().mean() * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ torch.nn.functional.one_hot(y).double())

    def judge(images: Tensor) -> Tensor:
        scores: Tensor = features(images) @ weights
        return scores.argmax(dim=1)

    held_out, truth = (torch.from_numpy(a) for a in _some(ShardDataset(data / "test"), num_test))
    return judge, float((judge(held_out) == truth).double().mean())


def _some(dataset: ShardDataset, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [num, 3, H, W] and classes [num] from all over a split."""
    return dataset.read(spread(len(dataset), num))


def guided_samples(export: Path, sampling: SamplingConfig, num: int, device: torch.device) -> Tensor:
    """Images number 0 to num - 1, uint8 [num, 3, H, W]."""
    opened = open_export(export)
    stage = Stage.open(opened.network("ema").to(device), opened.config, sampling, device)
    numbers = range(num)
    return torch.cat([sample(stage, numbers[i : i + BATCH], device=device) for i in range(0, num, BATCH)])


@torch.no_grad()
def own_opinion(classifier: Path, images: Tensor, labels: Tensor) -> float:
    """The mean probability of the classes [N] in finished images."""
    opened = open_export(classifier)
    time = GaussianDiffusion.create(opened.config.diffusion).network_time(torch.zeros(len(images), dtype=torch.long))
    says = opened.network("ema")(images.float() / 127.5 - 1, time).softmax(dim=1)
    return float(says.gather(1, labels[:, None]).mean())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("classifier", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of the splits train and test")
    parser.add_argument("--scales", default="0,1,4")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--respacing", default="ddim50")
    parser.add_argument("--num", type=int, default=100, help="samples a scale")
    parser.add_argument("--num-train", type=int, default=3000, help="images that the judge learns from")
    parser.add_argument("--num-test", type=int, default=1000, help="held-out images that judge the judge")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--out", type=Path, help="figure (png)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    a = parser.parse_args()
    device = pick_device(a.num_threads)
    num_classes = open_export(a.classifier).config.model.num_classes
    labels = torch.arange(a.num) % num_classes
    judge, right = make_judge(a.data, a.num_train, a.num_test)
    print(f"judge: names the class of {right:.1%} of {a.num_test:,} held-out images")
    rows, shown = [], []
    for scale in map(float, a.scales.split(",")):
        sampling = SamplingConfig(
            sampler=a.sampler, respacing=a.respacing, classifier=a.classifier, classifier_scale=scale
        )
        images = guided_samples(a.export, sampling, a.num, device)
        share = float((judge(images) == labels).double().mean())
        own = own_opinion(a.classifier, images, labels)
        rows.append(Row(scale, share, (share * (1 - share) / a.num) ** 0.5, own))
        print(f"scale {scale:g}: {share:.1%} ± {rows[-1].stderr:.1%} show their class; the classifier's own {own:.3f}")
        shown.append(images[:num_classes].permute(0, 2, 3, 1).numpy())
    if a.out is not None:
        names = ShardDataset(a.data / "train").manifest.class_names
        sides = [f"s = {row.scale:g}\n{row.shown:.0%}" for row in rows]
        save_figure(draw_rows(np.stack(shown), heads=names, sides=sides), a.out)
    if a.json is not None:
        how = {"sampler": a.sampler, "respacing": a.respacing, "num": a.num}
        write_json(a.json, {"judge": right, **how, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    run_cli(main)
