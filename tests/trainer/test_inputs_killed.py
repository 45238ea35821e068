"""The sequence of (sample key, mirrored) of a run that is killed again and again, going on with other processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.counter_rng import Stream, uniform
from data_pipeline.dataset import ShardDataset
from data_pipeline.order import EpochOrder
from trainer.config.run import RunConfig, load_config
from trainer.inputs import InputSource, open_dataset
from trainer.processes import Processes

BATCH = 8


def read_on(config: RunConfig, rank: int, world_size: int, first: int, last: int, log: Path) -> None:
    """One process of a run: notes what every step from image `first` brings it."""
    source = InputSource(config, open_dataset(config), Processes(rank, world_size, rank, torch.device("cpu")))
    with open(log, "w") as file, source.steps(first, last, BATCH) as steps:
        for nimg, inputs in zip(range(first, last, BATCH), steps, strict=True):
            images = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in inputs.images]
            file.write(json.dumps([nimg, images]) + "\n")
            file.flush()
            time.sleep(0.002)  # the time of a step: workers get ahead


def lines(log: Path) -> list[list[object]]:
    """The complete lines of a log."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def lived(
    config: RunConfig, folder: Path, life: int, first: int, last: int, world_size: int, enough: int | None
) -> list[list[str]]:
    """One life: its processes are killed once all have seen `enough` steps (None: it reaches the end).

    Returns the images of the global batches that all of them have seen.
    """
    context = multiprocessing.get_context("fork")
    logs = [folder / f"{life}-{rank}" for rank in range(world_size)]
    processes = [
        context.Process(target=read_on, args=(config, rank, world_size, first, last, log))
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            if enough is not None and all(len(lines(log)) >= enough for log in logs):
                break
            time.sleep(0.005)
    finally:
        for process in processes:
            process.kill()
            process.join()
    each = [lines(log) for log in logs]
    return [[image for part in step for image in part[1]] for step in zip(*each, strict=False)]


def known_images(dataset: ShardDataset) -> dict[str, tuple[bytes, bool]]:
    """(key, mirrored) of every image of the data set, by the sum of its pixels' bytes."""
    images, _ = dataset.read(np.arange(len(dataset)))
    keys = dataset.index.key.tolist()
    known = {}
    for key, image in zip(keys, images, strict=True):
        for mirrored, pixels in ((False, image), (True, image[:, :, ::-1])):
            known[hashlib.sha256(pixels.tobytes()).hexdigest()] = (key, mirrored)
    assert len(known) == 2 * len(dataset)
    return known


def expected(dataset: ShardDataset, config: RunConfig, num_images: int) -> list[tuple[bytes, bool]]:
    """The sequence by its definition: the epochs' order, and one coin an image."""
    sizes = np.array([shard.num_samples for shard in dataset.manifest.shards])
    order = EpochOrder(sizes, seed=config.seed, window=config.data.shuffle_window)
    samples = order.samples(0, num_images)
    mirrored = uniform(config.seed, Stream.FLIP, 0, num_images) < 0.5
    return list(zip(dataset.index.key[samples].tolist(), mirrored.tolist(), strict=True))


def check_lives(
    tiny_config: Path, folder: Path, rng: random.Random, num_steps: int, layouts: list[tuple[int, int]]
) -> None:
    """Reads `num_steps` steps in as many lives as there are layouts (processes, workers), all but the last killed."""
    last = num_steps * BATCH
    seen: list[list[str]] = []
    for life, (world_size, num_workers) in enumerate(layouts):
        config = load_config(tiny_config, [
            f"data.num_workers={num_workers}", f"data.prefetch={rng.choice([1, 2, 5])}", "data.shuffle_window=100",
            f"data.num_threads={rng.choice([1, 2])}",
        ])  # fmt: skip
        is_last = life == len(layouts) - 1
        enough = None if is_last else rng.randint(1, 2 * num_steps // len(layouts))
        found = lived(config, folder, life, len(seen) * BATCH, last, world_size, enough)
        seen += found[: rng.randint(0, len(found))] if not is_last else found  # the last checkpoint was earlier
    dataset = ShardDataset(config.data.train)
    known = known_images(dataset)
    assert [known[image] for step in seen for image in step] == expected(dataset, config, last)


@pytest.mark.parametrize("seed", range(3))
def test_the_sequence_survives_kills(tiny_config: Path, tmp_path: Path, seed: int) -> None:
    """3,200 images, twelve epochs and a half, each; hundreds of steps between the kills or none."""
    rng = random.Random(seed)
    layouts = [(rng.choice([1, 2, 4]), 0) for _ in range(5)]
    check_lives(tiny_config, tmp_path, rng, 400, layouts)


def test_the_sequence_survives_kills_with_workers(tiny_config: Path, tmp_path: Path) -> None:
    check_lives(tiny_config, tmp_path, random.Random(9), 100, [(1, 2), (2, 0), (1, 1)])


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(6))
def test_any_number_of_processes_and_workers(tiny_config: Path, tmp_path: Path, seed: int) -> None:
    """6,400 images in 8 lives of 1, 2 or 4 processes with 0 to 4 workers each."""
    rng = random.Random(100 + seed)
    layouts = [(rng.choice([1, 2, 4]), rng.randint(0, 4)) for _ in range(8)]
    check_lives(tiny_config, tmp_path, rng, 800, layouts)
