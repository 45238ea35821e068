"""What is asked of an evaluation, and the key that names it: equal requests have equal keys, whoever asks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import sha256_file
from data_pipeline.shard_files import read_manifest
from evaluation.ensemble import Ensemble
from evaluation.nll.settings import NllSettings
from evaluation.quality import FEWEST, KINDS, check_kinds
from trainer.config.sampling import SamplingConfig
from trainer.export import Weights
from trainer.guiding import samples_said

MEMORISATION = "memorisation"
ACCURACY = "accuracy"  # of classifiers, and all there is of them
OTHERS = ("nll", MEMORISATION, ACCURACY)  # metrics that are not of a feature net
# Part of every key: raised when a metric's definition changes, so that values of before are not taken for new ones.
DEFINITION = 3


@dataclass(frozen=True)
class EvalRequest:
    """What to measure of an export."""

    data: str | Path  # a data split: its folder or URL
    metrics: tuple[str, ...] = ("nll",)
    weights: Weights = "ema"
    seed: int = 0
    ensemble: Ensemble | None = None
    nll: NllSettings = field(default_factory=NllSettings)
    num_samples: int = 2048  # of each repeat
    repeats: int = 1  # sets of samples, of seeds seed, seed + 1, ...
    batch: int = 64  # samples a network call
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_reference: int | None = None  # real images that samples are compared with; default: the whole split
    reference: Path | None = None  # npz of published statistics to compare with instead
    feature_net: str = "efflite0"
    feature_weights: Path | None = None  # the net's weights file, for those that come with no package
    train_data: str | Path | None = None  # the split that was trained on, for `memorisation`
    accuracy_calls: int | None = None  # noisy images that a classifier is asked about; default: the split's number
    num_threads: int | None = None  # of a CPU; no part of the key

    @property
    def kinds(self) -> tuple[str, ...]:
        """The metrics of samples among those asked for, by kind. Raises UserError for what the net does not give."""
        names = [metric for metric in self.metrics if metric not in OTHERS]
        return check_kinds(names, self.feature_net, others=OTHERS) if names else ()

    def key(self, network: str) -> str:
        """Names the evaluation of a network, which `subject.weights_identity` names."""
        content = {
            "definition": DEFINITION,
            "metrics": {metric: self.settings(metric) for metric in self._asked},
            "weights": self.weights,
            "seed": self.seed,
            "data": read_manifest(self.data).fingerprint,
            "network": network,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _asked(self) -> tuple[str, ...]:
        return (*(metric for metric in OTHERS if metric in self.metrics), *self.kinds)

    def settings(self, metric: str) -> dict[str, Any]:
        """What the value of this metric depends on: only this names it."""
        if metric == "nll":
            nll, mode = self.nll, self.nll.mode
            size = {"num_images": nll.num_images} if mode == "exact" else {
                "num_calls": nll.num_calls, "target_stderr": nll.target_stderr}  # fmt: skip
            return {"mode": mode, **size, "respacing": nll.respacing, "clip_denoised": nll.clip_denoised}
        if metric == ACCURACY:
            return {"num_calls": self.accuracy_calls}
        if metric == MEMORISATION:
            assert self.train_data is not None
            train = read_manifest(self.train_data).fingerprint
            return {"train_data": train, "sampling": samples_said(self.sampling)}
        names = ("num_samples", "repeats", "batch", "num_reference", "feature_net")
        files = {"reference": self.reference, "feature_weights": self.feature_weights}
        return (
            {name: getattr(self, name) for name in names}
            | {name: None if path is None else _hash(path) for name, path in files.items()}
            | {"sampling": samples_said(self.sampling)}
        )

    def check(self) -> None:
        """Raises UserError for what cannot be measured, before anything is computed."""
        if not self.metrics:
            raise UserError(f"no metric is asked for; known: {', '.join((*OTHERS, *KINDS))}.")
        if "nll" in self.metrics:
            self.nll.check()
        for name, least in (
            ("seed", 0), ("num_reference", 2), ("num_threads", 1), ("repeats", 1), ("batch", 1), ("accuracy_calls", 2)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small; use {least} or more.")
            if value is not None and value >= 2**63:
                raise UserError(f"--{name.replace('_', '-')} {value} is too large; use less than 2**63.")
        least = max((FEWEST[kind] for kind in self.kinds), default=0)
        if self.num_samples < least:
            raise UserError(f"--num-samples {self.num_samples} are too few for these metrics; use {least} or more.")
        if MEMORISATION in self.metrics and self.train_data is None:
            raise UserError(f"{MEMORISATION} compares samples with training images: name their split, --train-data.")
        for path in (self.reference, self.feature_weights):
            if path is not None and not path.is_file():
                raise UserError(f"{path}: no such file.")

    def check_data(self) -> None:
        """Raises UserError for data that is not there, or not what was asked for; it reads manifests only."""
        there = read_manifest(self.data)
        if self.num_reference and self.num_reference > there.num_samples:
            raise UserError(f"--num-reference {self.num_reference}: {self.data} has {there.num_samples} images.")
        train = self.train_data if MEMORISATION in self.metrics else None
        if train is not None and read_manifest(train).fingerprint == there.fingerprint:
            raise UserError(f"{MEMORISATION} compares with held-out images: let --data be another split.")


def _hash(path: Path) -> str:
    stat = path.stat()
    return _hash_once(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_once(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
