"""A small split whose classes can be told apart: four colours, under noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.manifest import SAMPLES, SourceInfo
from evaluation.sample_files import write_split

# What makes the tests' tiny run one of a classifier.
CLASSIFIER = (
    "model={name: classifier, channels: 6, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [8], "
    "num_heads: 2, num_classes: 4}",
    "diffusion.objective=cross_entropy", "name=noisy",
)  # fmt: skip
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [150, 150, 40]])


def write_coloured(folder: Path, *, num: int = 128, unlabelled: tuple[int, ...] = ()) -> Path:
    """Images 16x16 of classes 0, 1, 2, 3, 0, ...; those of the numbers `unlabelled` have none."""
    folder.mkdir(parents=True)
    labels = np.arange(num) % 4
    noise = np.random.default_rng(0).normal(0, 40, (num, 16, 16, 3))
    images = (COLOURS[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    write_split(
        folder, [images], numbers=range(num), image_size=16, num_classes=4, name="colours",
        labels=[-1 if number in unlabelled else int(label) for number, label in enumerate(labels)],
        source=SourceInfo(kind=SAMPLES, options={}, origin="made"),
    )  # fmt: skip
    return folder
