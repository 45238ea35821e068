"""How to sample, as commands are told: the same options wherever images are made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from trainer.config.sampling import SamplerName, SamplingConfig, ThresholdName
from trainer.config.tree import validate

RESPACINGS = "50, 10,15,20, ddim50, quadratic50, logsnr20, karras20"
_OPTIONS = (
    "sampler", "eta", "threshold", "threshold_quantile", "corrector_steps", "corrector_snr", "classifier_weights",
)  # fmt: skip
_OF_A_NETWORK = ("respacing", "guidance", "classifier", "classifier_scale")


def add_sampling_options(parser: argparse._ActionsContainer, *, sampler: SamplerName) -> None:
    """All but --respacing, --guidance and --classifier, of which a cascade may have one for each stage.

    `sampler`: the default one.
    """
    add = parser.add_argument
    add("--sampler", choices=get_args(SamplerName), default=sampler)
    add("--eta", type=float, default=0.0, help="noise of ddim")
    add("--threshold", choices=get_args(ThresholdName), default="static", help="bound on every predicted x_0")
    add("--threshold-quantile", type=float, help="of --threshold dynamic, such as 0.995")
    add("--corrector-steps", type=int, default=0, help="Langevin steps wherever the sampler arrives")
    add("--corrector-snr", type=float, help="signal-to-noise ratio of each of them, such as 0.16")
    add("--classifier-weights", default="ema", help="weights of --classifier: ema, model, or such as ema_0.999")


def sampling_of(a: argparse.Namespace, **others: Any) -> SamplingConfig:
    """The config that these options and `others` say. Raises ConfigError for those that do not go together."""
    return validate(SamplingConfig, {name: getattr(a, name) for name in _OPTIONS} | others, source="arguments")


def add_network_options(parser: argparse._ActionsContainer, *, sampler: SamplerName, respacing: str) -> None:
    """All options, for a single network; `sampler` and `respacing`: the default ones."""
    add_sampling_options(parser, sampler=sampler)
    add = parser.add_argument
    add("--respacing", default=respacing, help=f"sampling steps: {RESPACINGS}")
    add("--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1: none")
    add("--classifier", type=Path, help="export of a classifier that guides the samples")
    add("--classifier-scale", type=float, default=1.0, help="scale of its gradient")


def network_sampling_of(a: argparse.Namespace) -> SamplingConfig:
    """The config that the options for a single network say; errors as `sampling_of`."""
    return sampling_of(a, **{name: getattr(a, name) for name in _OF_A_NETWORK})
