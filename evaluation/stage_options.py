"""How the stages of a cascade are sampled, each in its own way, as `evaluation.sample` is told."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeVar

from data_pipeline.errors import UserError
from evaluation.sampling_options import RESPACINGS, sampling_of
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.respacing import count_timesteps
from trainer.export import Export

T = TypeVar("T")


def add_stage_options(parser: argparse._ActionsContainer) -> None:
    """Those that are given once, or for each stage that they can be for."""
    add = parser.add_argument
    add("--respacing", action="append", help=f"steps: {RESPACINGS}; once, or for each export")
    add(
        "--guidance", type=float, action="append",
        help="classifier-free guidance: 1 is none, 0 without classes; once, or for each export",
    )  # fmt: skip
    add(
        "--low-res-noise", type=int, action="append",
        help="step s of the noise on small images, 0 is none; once, or for each export that enlarges some",
    )  # fmt: skip
    add(
        "--augmentation", choices=("non_truncated", "truncated"), action="append",
        help="where it comes from: finished images are noised, or the stage below ends at s; once, or for each",
    )  # fmt: skip
    add(
        "--classifier", action="append", metavar="EXPORT",
        help="export of a classifier that guides the samples, or none; once, or for each export",
    )  # fmt: skip
    add(
        "--classifier-scale", type=float, action="append", help="of its gradient (default: 1); once, or for each export"
    )


def samplings_of(a: argparse.Namespace, exports: Sequence[Export]) -> list[SamplingConfig]:
    """How each export is sampled. Raises UserError for steps that its process has not, and for options in vain."""
    respacings = _for_each("--respacing", a.respacing or ["50"], len(exports))
    guidances = _for_each("--guidance", a.guidance or [1.0], len(exports))
    guides = _guides(a, len(exports))
    samplings = []
    for export, respacing, guidance, noise, guide in zip(
        exports, respacings, guidances, _noises(a), guides, strict=True
    ):
        samplings.append(sampling_of(a, respacing=respacing, guidance=guidance, **noise, **guide))
        count_timesteps(export.config.diffusion.num_timesteps, samplings[-1].respacing)
    return samplings


def _noises(a: argparse.Namespace) -> list[dict[str, Any]]:
    """How noisy each export is given its small images, and by which way, as keys of SamplingConfig."""
    first: list[dict[str, Any]] = [] if a.base else [{}]  # makes its images of nothing
    num = len(a.exports) - len(first)
    if not num and (a.low_res_noise or a.augmentation):
        raise UserError("--low-res-noise and --augmentation are for images that are enlarged, and here none are.")
    steps = _for_each("--low-res-noise", a.low_res_noise or [0], num)
    kinds = _for_each("--augmentation", a.augmentation or ["non_truncated"], num)
    pairs = list(zip(steps, kinds, strict=True))
    # Given once, it is for the stages that have noise; there must be one.
    if (0, "truncated") in pairs and (len(a.augmentation) > 1 or not any(steps)):
        raise UserError(
            "--augmentation truncated ends the stage below at step --low-res-noise, which is 0: its image; give it a "
            "--low-res-noise above 0, or --augmentation non_truncated."
        )
    return first + [{"low_res_noise": step, "augmentation": kind} if step else {} for step, kind in pairs]


def _guides(a: argparse.Namespace, num: int) -> list[dict[str, Any]]:
    """What each stage's `SamplingConfig` says of the classifier that guides it."""
    paths = _for_each("--classifier", a.classifier or ["none"], num)
    scales = _for_each("--classifier-scale", a.classifier_scale or [1.0], num)
    if set(paths) == {"none"} and a.classifier_scale:
        raise UserError(
            f"--classifier-scale {a.classifier_scale[0]:g} is for --classifier EXPORT; give both, or neither."
        )
    if set(paths) == {"none"}:
        return [{}] * num
    vain = [scale for path, scale in zip(paths, scales, strict=True) if path == "none" and scale != 1]
    if vain and len(a.classifier_scale) > 1:  # given once, it is for the stages that have a classifier
        raise UserError(f"--classifier-scale {vain[0]:g} is for a stage with --classifier none; give it a scale of 1.")
    return [
        {"classifier_weights": "ema"} if path == "none" else {"classifier": path, "classifier_scale": scale}
        for path, scale in zip(paths, scales, strict=True)
    ]


def _for_each(option: str, values: list[T], num: int) -> list[T]:
    if len(values) not in (1, num):
        raise UserError(f"{option} was given {len(values)} times for {num} stages; once, or for each.")
    return values * (num // len(values))
