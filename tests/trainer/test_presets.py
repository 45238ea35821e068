"""The shipped run configs: each is valid, and the published ones are what was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from trainer.cascade import check_augmentation, check_cascade
from trainer.config.model import ClassifierConfig, EncoderConfig
from trainer.config.run import load_config
from trainer.config.sampling import SamplingConfig
from trainer.interop.presets import find_preset, preset_names
from trainer.models import count

K = 1000
NOT_PUBLISHED = {
    *(f"cifar10/cascade_{stage}" for stage in ("8", "8_16", "16_32")),
    "imagenet32/cdm",
    "imagenet64/cdm_32_64",
    "imagenet256/cdm_64_256",
    "cifar10/adm_small",
    "cifar10/dit_small",
    *(f"imagenet64/dit/{size}" for size in ("s", "b", "l", "xl")),
    "cifar10/classifier_small",
    "cifar10/guided_small",
    "cifar10/ema_profiles",
    "cifar10/dpm_solver",
    "cifar10/min_snr",
    "cifar10/sigmoid",
    "cifar10/small",
    "cifar10/simple",
    "imagenet256/class_conditional",
}


@dataclass(frozen=True)
class Published:
    """A row of the table of published runs (Nichol & Dhariwal 2021 and the flags published with its code)."""

    channels: int
    num_res_blocks: int
    process: tuple[int, str]  # T and schedule
    objective: tuple[str, str]  # and how timesteps are drawn
    lr: float
    batch: int
    iterations: int
    num_params: int
    dropout: float = 0.0
    num_classes: int = 0
    rescaled: bool = True  # both rescaling flags
    attention: tuple[int, tuple[int, ...], bool] = (4, (16, 8), True)  # heads, sizes, scale-shift norm
    sizes: tuple[int, int] = (64, 0)  # image and low-resolution input
    channel_mult: tuple[float, ...] = ()  # where it is not the one of the image size
    adm: tuple[int | None, str, bool] = (None, "heads_first", False)  # head width, attention order, resizing blocks
    weight_decay: float = 0.0
    lr_decay: str = "none"


HYBRID, VLB = ("hybrid", "uniform"), ("vlb", "loss_second_moment")
COSINE, LINEAR = (4000, "cosine"), (4000, "linear")
CIFAR10: dict[str, Any] = {"dropout": 0.3, "sizes": (32, 0)}
LSUN: dict[str, Any] = {"rescaled": False, "attention": (1, (16,), False), "sizes": (256, 0)}
ADM_ATTENTION = (4, (32, 16, 8), True)
# Dhariwal & Nichol 2021, tables 11 to 13; the parameters are those of the networks in its code.
ADM: dict[str, Any] = {"rescaled": False, "attention": ADM_ATTENTION, "num_classes": 1000}
HEADS, WIDE_HEADS = (None, "heads_first", True), (64, "heads_first", True)
T1000, T1000_COSINE = (1000, "linear"), (1000, "cosine")
CLASSIFIER: dict[str, Any] = {**ADM, "adm": WIDE_HEADS, "weight_decay": 0.05, "lr_decay": "linear"}
CLASSIFY = ("cross_entropy", "uniform")
ADM_NETWORKS = {
    "imagenet64/adm": Published(
        192, 3, T1000_COSINE, HYBRID, 3e-4, 2048, 540 * K, 295_904_454,
        **ADM | {"dropout": 0.1, "adm": (64, "qkv_first", True)},
    ),
    "imagenet128/adm": Published(
        256, 2, T1000, HYBRID, 1e-4, 256, 4360 * K, 421_529_606, sizes=(128, 0), adm=HEADS, **ADM
    ),
    "imagenet256/adm": Published(
        256, 2, T1000, HYBRID, 1e-4, 256, 1980 * K, 553_838_086, sizes=(256, 0), adm=WIDE_HEADS, **ADM
    ),
    "imagenet512/adm": Published(
        256, 2, T1000, HYBRID, 1e-4, 256, 1940 * K, 558_997_638, sizes=(512, 0), adm=WIDE_HEADS, **ADM
    ),
    "imagenet256/adm_upsampler": Published(
        192, 2, T1000, HYBRID, 1e-4, 256, 500 * K, 311_795_910, sizes=(256, 64), adm=HEADS, **ADM
    ),
    "imagenet512/adm_upsampler": Published(
        192, 2, T1000, HYBRID, 1e-4, 256, 1050 * K, 308_835_270, sizes=(512, 128), channel_mult=(1, 1, 2, 2, 4, 4),
        **ADM | {"adm": WIDE_HEADS, "attention": (4, (32, 16), True)},
    ),
    "lsun256/adm_bedroom": Published(
        256, 2, T1000, HYBRID, 1e-4, 256, 500 * K, 552_814_086, sizes=(256, 0), adm=WIDE_HEADS,
        **ADM | {"num_classes": 0, "dropout": 0.1},
    ),
    "imagenet64/classifier": Published(
        128, 4, T1000_COSINE, CLASSIFY, 6e-4, 1024, 400 * K, 65_438_568, **CLASSIFIER | {"weight_decay": 0.2}
    ),
    "imagenet128/classifier": Published(
        128, 2, T1000, CLASSIFY, 3e-4, 256, 300 * K, 42_568_040, sizes=(128, 0), **CLASSIFIER
    ),
    "imagenet256/classifier": Published(
        128, 2, T1000, CLASSIFY, 3e-4, 256, 500 * K, 54_096_360, sizes=(256, 0), **CLASSIFIER
    ),
    "imagenet512/classifier": Published(
        128, 2, T1000, CLASSIFY, 3e-4, 256, 500 * K, 54_448_360, sizes=(512, 0), **CLASSIFIER
    ),
}  # fmt: skip
PUBLISHED = {
    **ADM_NETWORKS,
    "imagenet64/hybrid": Published(128, 3, COSINE, HYBRID, 1e-4, 128, 1500 * K, 121_063_942),
    "imagenet64/vlb": Published(128, 3, COSINE, VLB, 1e-4, 128, 1500 * K, 121_063_942),
    "cifar10/hybrid": Published(128, 3, COSINE, HYBRID, 1e-4, 128, 500 * K, 52_546_438, **CIFAR10),
    "cifar10/vlb": Published(128, 3, COSINE, VLB, 1e-4, 128, 500 * K, 52_546_438, **CIFAR10),
    "imagenet64/class_conditional": Published(
        192, 3, COSINE, HYBRID, 3e-4, 2048, 250 * K, 273_049_350, num_classes=1000, rescaled=False
    ),
    "imagenet256/upsampler": Published(
        192, 2, LINEAR, HYBRID, 3e-4, 256, 500 * K, 279_792_390, num_classes=1000, rescaled=False, sizes=(256, 64)
    ),
    "lsun256/bedroom": Published(128, 2, (1000, "linear"), HYBRID, 1e-4, 128, 1200 * K, 113_676_678, **LSUN),
    "lsun256/bedroom_lr2e-5": Published(128, 2, (1000, "linear"), HYBRID, 2e-5, 128, 2400 * K, 113_676_678, **LSUN),
    **{
        f"imagenet64/ladder/c{c}": Published(c, 3, COSINE, HYBRID, 1e-4 / (c / 128) ** 0.5, 128, 1500 * K, num_params)
        for c, num_params in ((64, 30_303_494), (96, 68_126_598), (128, 121_063_942), (192, 272_281_350))
    },
}
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)
}  # fmt: skip


def test_every_file_is_in_the_table_or_known_not_to_be_published() -> None:
    assert set(preset_names()) == PUBLISHED.keys() | NOT_PUBLISHED


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_named_after_its_file(name: str) -> None:
    config = load_config(find_preset(name))
    assert config.name == name.replace("/", "-").replace("_", "-")
    assert config.run.folder.as_posix() == f"runs/{config.name}"  # two presets never share a folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_are_what_was_published(name: str) -> None:
    config, row = load_config(find_preset(name)), PUBLISHED[name]
    model, diffusion, train = config.model, config.diffusion, config.train
    assert isinstance(model, EncoderConfig)
    assert (model.image_size, model.low_res_size) == row.sizes
    channel_mult = row.channel_mult or CHANNEL_MULT[model.image_size]
    assert (model.channels, model.channel_mult) == (row.channels, channel_mult)
    assert model.num_res_blocks == row.num_res_blocks
    assert (model.num_heads, model.attention_resolutions, model.use_scale_shift_norm) == row.attention
    assert (model.num_head_channels, model.attention_order, model.resblock_updown) == row.adm
    assert isinstance(model, ClassifierConfig) == (row.objective == CLASSIFY)
    assert not isinstance(model, ClassifierConfig) or model.pool == "attention"
    assert (model.dropout, model.num_classes, model.null_class) == (row.dropout, row.num_classes, False)
    assert count(model, diffusion).num_params == row.num_params

    assert (diffusion.num_timesteps, diffusion.schedule) == row.process
    assert (diffusion.objective, diffusion.timestep_sampler) == row.objective
    assert (diffusion.prediction, diffusion.variance, diffusion.mse_target) == ("eps", "learned_range", None)
    assert diffusion.rescale_timesteps == row.rescaled
    assert row.objective == CLASSIFY or diffusion.vlb_factor == (
        1 / 1000 if row.rescaled else 1 / diffusion.num_timesteps
    )

    assert train.lr == pytest.approx(row.lr, rel=1e-12)
    assert train.global_batch == row.batch
    assert train.budget_images == row.batch * row.iterations
    assert (train.betas, train.weight_decay, train.ema_decay) == ((0.9, 0.999), row.weight_decay, 0.9999)
    assert train.lr_decay == row.lr_decay
    assert (train.warmup_images, train.grad_clip, train.class_dropout) == (0, 0.0, 0.0)


def test_an_unknown_preset_lists_the_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"--preset imagenet64/hybird.*imagenet64/hybrid"):
        find_preset("imagenet64/hybird")
    with pytest.raises(ConfigError, match=r"known: cifar10/.*lsun256/bedroom"):
        find_preset("qqq")


@pytest.mark.parametrize(
    "stages",
    [
        ("cifar10/cascade_8", "cifar10/cascade_8_16", "cifar10/cascade_16_32"),
        ("imagenet32/cdm", "imagenet64/cdm_32_64", "imagenet256/cdm_64_256"),
        ("imagenet64/class_conditional", "imagenet256/cdm_64_256"),
    ],
    ids=lambda stages: stages[-1],
)
def test_stages_of_a_cascade_fit_together(stages: tuple[str, ...]) -> None:
    """In sizes and classes, and in noise: truncated at the largest s of each."""
    configs = [load_config(find_preset(name)) for name in stages]
    check_cascade(configs)
    steps = [0 if config.model.low_res_noise is None else config.model.low_res_noise.max_step for config in configs]
    kinds: list[Any] = ["truncated" if step else "non_truncated" for step in steps]
    samplings = [
        SamplingConfig(respacing="4000", low_res_noise=step, augmentation=kind)
        for step, kind in zip(steps, kinds, strict=True)
    ]
    assert steps[0] == 0
    assert all(steps[1:])
    check_augmentation(configs, samplings)
