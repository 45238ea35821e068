"""What a training step consumes is a function of (seed, image number), whoever makes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from trainer.config.run import load_config
from trainer.inputs import NO_LABEL, InputSource, open_dataset
from trainer.processes import Processes
from trainer.step_inputs import StepInputs

CLASSES = ("model.num_classes=4", "model.null_class=true")
LOW_RES = ("model.low_res_size=8", "model.low_res_noise.max_step=3")


def made(config_path: Path, *overrides: str, world_size: int = 1, nimg: int = 16) -> StepInputs:
    """The whole global batch that begins at nimg, made by that many processes."""
    config = load_config(config_path, overrides)
    dataset = open_dataset(config)
    shares = []
    for rank in range(world_size):
        source = InputSource(config, dataset, Processes(rank, world_size, rank, torch.device("cpu")))
        shares.append(source.make(nimg))
        source.close()
    fields = [name for name, value in vars(shares[0]).items() if isinstance(value, torch.Tensor)]
    return StepInputs(**{field: torch.cat([getattr(share, field) for share in shares]) for field in fields})


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_inputs_do_not_depend_on_the_number_of_processes(tiny_config: Path, sampler: str) -> None:
    settings = (*CLASSES, *LOW_RES, f"diffusion.timestep_sampler={sampler}", "train.class_dropout=0.5")
    whole = made(tiny_config, *settings)
    for world_size in (2, 4):
        parts = made(tiny_config, *settings, world_size=world_size)
        for field in ("images", "labels", "u", "noise", "low_res_step", "low_res_noise"):
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


def test_noise_on_small_images_is_drawn_for_each_image(tiny_config: Path) -> None:
    batches = [made(tiny_config, *LOW_RES, nimg=8 * step) for step in range(100)]
    steps = torch.cat([batch.low_res_step for batch in batches])  # type: ignore[misc]
    noise = torch.cat([batch.low_res_noise for batch in batches])  # type: ignore[misc]
    assert noise.shape == (800, 3, 8, 8)
    assert steps.unique().tolist() == [0, 1, 2, 3]  # max_step among them
    counts = steps.bincount()
    assert float(((counts - 200) ** 2 / 200).sum()) < 16.3  # chi-squared with 3 degrees of freedom: 1 in 1000
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    # None of it goes by the timestep, or by the noise of the image itself.
    u = torch.cat([batch.u for batch in batches])
    assert abs(float(torch.corrcoef(torch.stack([u, steps.double()]))[0, 1])) < 0.12
    large = torch.cat([batch.noise for batch in batches])[:, :, ::2, ::2]
    assert abs(float((large * noise).mean())) < 0.01


def test_other_inputs_do_not_change_with_noise_on_small_images(tiny_config: Path) -> None:
    plain, noisy = made(tiny_config, "model.low_res_size=8"), made(tiny_config, *LOW_RES)
    assert plain.low_res_step is None
    assert plain.low_res_noise is None
    for field in ("images", "labels", "u", "noise"):
        assert torch.equal(getattr(plain, field), getattr(noisy, field))


def test_micro_batches_carry_all_there_is(tiny_config: Path) -> None:
    whole = made(tiny_config, *LOW_RES)
    for field in ("images", "u", "low_res_step", "low_res_noise"):
        parts = [getattr(part, field) for part in whole.split(2)]
        assert len(parts) == 4
        assert torch.equal(torch.cat(parts), getattr(whole, field))
    assert len(list(made(tiny_config).split(8))) == 1
