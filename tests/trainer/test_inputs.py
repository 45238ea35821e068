"""What a training step consumes is a function of (seed, image number), whoever makes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from trainer.config import load_config
from trainer.inputs import NO_LABEL, InputSource, open_dataset
from trainer.processes import Processes
from trainer.step_inputs import StepInputs

CLASSES = ("model.num_classes=4", "model.null_class=true")


def made(config_path: Path, *overrides: str, world_size: int = 1, nimg: int = 16) -> StepInputs:
    """The whole global batch that begins at nimg, made by that many processes."""
    config = load_config(config_path, overrides)
    dataset = open_dataset(config)
    shares = []
    for rank in range(world_size):
        source = InputSource(config, dataset, Processes(rank, world_size, rank, torch.device("cpu")))
        shares.append(source.make(nimg))
        source.close()
    fields = ("images", "labels", "u", "noise")
    return StepInputs(*(torch.cat([getattr(share, field) for share in shares]) for field in fields))


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_inputs_do_not_depend_on_the_number_of_processes(tiny_config: Path, sampler: str) -> None:
    settings = (*CLASSES, f"diffusion.timestep_sampler={sampler}", "train.class_dropout=0.5")
    whole = made(tiny_config, *settings)
    for world_size in (2, 4):
        parts = made(tiny_config, *settings, world_size=world_size)
        for field in ("images", "labels", "u", "noise"):
            assert torch.equal(getattr(whole, field), getattr(parts, field)), field


def test_stratified_draws_have_one_in_each_part_of_the_batch(tiny_config: Path) -> None:
    orders = []
    for nimg in (0, 8, 16):
        u = made(tiny_config, "diffusion.timestep_sampler=stratified", nimg=nimg).u
        strata = (u * 8).long()
        assert strata.sort().values.tolist() == list(range(8))
        assert 0.15 < float((u * 8 - strata).std()) < 0.45  # spread within the parts: 1 / sqrt(12) = 0.29
        orders.append(strata.tolist())
    assert orders[0] != orders[1] != orders[2]  # no process keeps to the same timesteps


def test_stratified_draws_vary_less_and_are_uniform(tiny_config: Path) -> None:
    """Means over a batch: independent draws have variance 1 / 12B, stratified ones 1 / 12B³."""
    variances = {}
    for sampler in ("uniform", "stratified"):
        setting = f"diffusion.timestep_sampler={sampler}"
        u = torch.stack([made(tiny_config, setting, nimg=8 * step).u for step in range(60)])  # [60, 8]
        variances[sampler] = float(u.mean(dim=1).var())
        assert float(u.mean()) == pytest.approx(0.5, abs=0.06)
        assert np.histogram(u.flatten().numpy(), bins=4, range=(0, 1))[0].min() > 90  # of 480
    assert variances["stratified"] < variances["uniform"] / 10


def test_class_dropout_replaces_its_share_of_labels(tiny_config: Path) -> None:
    given = torch.cat([made(tiny_config, *CLASSES, nimg=8 * i).labels for i in range(40)])
    kept = torch.cat([made(tiny_config, *CLASSES, "train.class_dropout=0.25", nimg=8 * i).labels for i in range(40)])
    dropped = kept == NO_LABEL
    assert torch.equal(given[~dropped], kept[~dropped])
    assert 0.15 < float(dropped.float().mean()) < 0.35
    assert (given >= 0).all()


def test_dropping_is_independent_of_everything_else(tiny_config: Path) -> None:
    batches = [made(tiny_config, *CLASSES, "train.class_dropout=0.5", nimg=8 * i) for i in range(60)]
    dropped = torch.cat([b.labels for b in batches]) == NO_LABEL
    others = {"u": torch.cat([b.u for b in batches]), "noise": torch.cat([b.noise[:, 0, 0, 0] for b in batches])}
    for name, other in others.items():  # 480 images: a correlation of chance stays below 3.5 / sqrt(480) = 0.16
        assert abs(float(np.corrcoef(dropped.numpy(), other.numpy())[0, 1])) < 0.16, name


def test_class_dropout_needs_a_null_class(tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.null_class=true"):
        load_config(tiny_config, ["model.num_classes=4", "train.class_dropout=0.1"])
    with pytest.raises(ConfigError, match=r"model\.num_classes"):
        load_config(tiny_config, ["model.null_class=true"])
