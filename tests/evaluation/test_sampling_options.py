"""How samples are made: told on command lines and in studies, named in keys and records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from cluster.definition.spec import DistanceConfig
from data_pipeline.errors import ConfigError
from evaluation.report.tables import metrics_table
from evaluation.request import EvalRequest
from evaluation.sampling_options import add_sampling_options, sampling_of
from trainer.config.sampling import SamplingConfig
from trainer.config.tree import validate
from trainer.diffusion.samplers import SAMPLERS
from trainer.tracking.points import _eval_key, _way
from trainer.tracking.records import EvalRecord

OTHERS: list[dict[str, Any]] = [
    {"sampler": "dpmpp_2m"},
    {"respacing": "karras20"},
    {"sampler": "ddim", "eta": 0.5},
    {"guidance": 2.0},
    {"threshold": "none"},
    {"threshold": "dynamic", "threshold_quantile": 0.995},
    {"threshold": "dynamic", "threshold_quantile": 0.9},
    {"corrector_steps": 1, "corrector_snr": 0.16},
    {"corrector_steps": 2, "corrector_snr": 0.16},
    {"corrector_steps": 1, "corrector_snr": 0.1},
]


def test_what_is_as_ever_is_named_as_ever(generated_data: Path) -> None:
    """Keys and records of before there were other settings stay what they are."""
    ever = {"sampler": "ddim", "respacing": "50", "eta": 0.0, "guidance": 1.0}
    assert SamplingConfig().said() == ever
    request = EvalRequest(data=generated_data / "test", metrics=("fd",))
    assert request.settings("fd")["sampling"] == ever
    given = {"threshold": "static", "corrector_steps": 0}
    assert validate(SamplingConfig, given, source="test").said() == ever


def test_every_setting_is_named(generated_data: Path) -> None:
    configs = [validate(SamplingConfig, other, source="test") for other in [{}, *OTHERS]]
    assert all(other.items() <= config.said().items() for other, config in zip([{}, *OTHERS], configs, strict=True))
    requests = [EvalRequest(data=generated_data / "test", metrics=("fd",), sampling=config) for config in configs]
    assert len({request.key("abc") for request in requests}) == len(configs)
    of_cascades = {"low_res_noise", "augmentation"}
    of_a_classifier = {"classifier", "classifier_scale", "classifier_weights"}  # see test_guided_samples
    assert SamplingConfig.model_fields.keys() - of_cascades - of_a_classifier == set().union(*OTHERS)


@pytest.mark.parametrize("other", OTHERS)
def test_commands_and_studies_say_it_alike(other: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser, sampler="ddim")
    words = [
        f"--{key.replace('_', '-')}={value}" for key, value in other.items() if key not in ("respacing", "guidance")
    ]
    rest = {key: value for key, value in other.items() if key in ("respacing", "guidance")}
    expected = validate(SamplingConfig, other, source="test")
    assert sampling_of(parser.parse_args(words), **rest) == expected
    assert validate(DistanceConfig, {"num_samples": 8, **other}, source="study").sampling == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "heun", "eta": 0.5}, "eta=0.5 is for sampler=ddim, but sampler=heun; leave it out"),
        ({"threshold": "dynamic"}, "threshold=dynamic needs a threshold_quantile; set one, such as 0.995"),
        ({"threshold_quantile": 0.9}, "threshold_quantile=0.9 is for threshold=dynamic, but threshold=static"),
        ({"threshold": "dynamic", "threshold_quantile": 1.5}, "threshold_quantile=1.5"),
        ({"threshold": "soft"}, "'static', 'dynamic' or 'none'"),
        ({"sampler": "plms"}, "'dpmpp_2m_sde'"),
        ({"corrector_steps": 1}, "corrector_steps=1 needs a corrector_snr"),
        ({"corrector_snr": 0.16}, "corrector_snr=0.16 is for a corrector, but corrector_steps=0"),
        ({"corrector_steps": -1, "corrector_snr": 0.16}, "corrector_steps=-1"),
        ({"corrector_steps": 1, "corrector_snr": 0}, "corrector_snr=0"),
    ],
)
def test_what_is_not_heard_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(SamplingConfig, settings, source="test")
    assert message in str(caught.value)


def test_a_config_knows_the_samplers_and_what_they_hear() -> None:
    """They are named twice, so that reading a config needs no torch."""
    for name, sampler in SAMPLERS.items():
        heard = []
        for option, value in (("eta", 0.5),):
            try:
                validate(SamplingConfig, {"sampler": name, option: value}, source="test")
                heard.append(option)
            except ConfigError:
                pass
        assert tuple(heard) == sampler.options
    with pytest.raises(ConfigError) as caught:
        validate(SamplingConfig, {"sampler": "none"}, source="test")
    assert all(f"'{name}'" in str(caught.value) for name in SAMPLERS)


def record_of(config: SamplingConfig) -> EvalRecord:
    return EvalRecord(
        metric="fd_efflite0", split="test", value=3.0, stderr=None, n=8, seeds=[0], measured={
            **config.said(), "feature_net": "efflite0", "num_reference": 64, "weights": "ema",
        }, details={}, data="d", weights="w", run="r", nimg=8, compute=1.0, num_params=1, flops_per_image=1.0, seed=0,
    )  # fmt: skip


def test_tables_and_trackers_say_what_is_unusual() -> None:
    plain, bounded, free, corrected = (
        record_of(validate(SamplingConfig, other, source="test")) for other in ({}, OTHERS[5], OTHERS[4], OTHERS[7])
    )
    assert "ddim 50, efflite0; 64 real\n" in metrics_table([plain]) + "\n"
    assert "threshold dynamic 0.995" in metrics_table([bounded])
    assert "threshold none" in metrics_table([free])
    assert "corrector steps 1, snr 0.16" in metrics_table([corrected])
    usual = _way(plain)
    assert _eval_key(plain, usual) == "fd_efflite0/test"
    assert _eval_key(free, usual) == "fd_efflite0/test - threshold none"
    assert _eval_key(plain, _way(free)) == "fd_efflite0/test - threshold static"
    assert _eval_key(corrected, usual) == "fd_efflite0/test - corrector_snr 0.16 - corrector_steps 1"
