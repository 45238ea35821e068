"""One request measured on one network: the work behind every record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import ShardDataset
from evaluation.accuracy import RECORDS, measure_accuracy
from evaluation.chunks import Advance, Arrays, Chunks, concatenated, cut
from evaluation.device import computed_on
from evaluation.features import FeatureNet, get_feature_net
from evaluation.features.feature_set import FeatureSet, feature_arrays, gather, spread
from evaluation.features.reference import published_features, real_floor, reference_features
from evaluation.neighbours import memorisation, nearest, neighbour_figure
from evaluation.nll.estimate import estimate_nll
from evaluation.quality import Measured, check_gives, need_rows, quality, record_name
from evaluation.request import ACCURACY, MEMORISATION, EvalRequest
from evaluation.sampling_job import sample_chunks
from evaluation.subject import Subject
from trainer.grid import save_grid
from trainer.guiding import samples_said
from trainer.sampling import sample
from trainer.tracking.records import EvalRecord

GRID_IMAGES = 64
NEIGHBOUR_SAMPLES = 16


class Evaluation:
    """One request, measured on one export."""

    def __init__(
        self, subject: Subject, dataset: ShardDataset, request: EvalRequest, chunks: Chunks, *,
        artifacts: Path | None, progress: bool,
    ) -> None:  # fmt: skip
        """`artifacts`: folder for pictures and arrays, None for none; `progress`: whether bars are shown."""
        self.subject, self.dataset, self.request, self.chunks = subject, dataset, request, chunks
        self.artifacts, self.progress = artifacts, progress

    def records(self) -> list[EvalRecord]:
        if ACCURACY in self.request.metrics:
            return self._accuracy()
        found = [self._nll()] if "nll" in self.request.metrics else []
        if MEMORISATION in self.request.metrics and self.chunks.shard.index == 0:  # small: not worth sharing
            found.append(self._memorisation())
        return found + (self._quality() if self.request.kinds else [])

    def _title(self, text: str) -> str:
        """Of a progress bar: "" shows none."""
        index, count = self.chunks.shard.index, self.chunks.shard.count
        whose = f"[{index + 1}/{count}] " if count > 1 else ""
        return whose + text if self.progress else ""

    def _nll(self) -> EvalRecord:
        settings = self.request.nll
        estimate = estimate_nll(
            self.subject.condition, self.subject.diffusion(settings.respacing), self.dataset, settings,
            seed=self.request.seed, device=self.subject.device, chunks=self.chunks,
            title=self._title(f"nll {self.dataset.manifest.split}"), final=not self.request.kinds,
        )  # fmt: skip
        if self.artifacts is not None:
            estimate.write_artifacts(self.artifacts)
        return self._record(
            "nll", Measured(estimate.bits_per_dim, estimate.stderr, estimate.details()), n=estimate.num_calls,
            seeds=[self.request.seed], measured=estimate.measured,
        )  # fmt: skip

    def _accuracy(self) -> list[EvalRecord]:
        """One record a figure of a classifier."""
        found = measure_accuracy(
            self.subject, self.dataset, self.request.accuracy_calls, seed=self.request.seed, chunks=self.chunks,
            title=self._title(f"accuracy {self.dataset.manifest.split}"),
        )  # fmt: skip
        if self.artifacts is not None:
            found.write_artifacts(self.artifacts)
        diffusion = self.subject.export.config.diffusion
        process = {"num_timesteps": diffusion.num_timesteps, "schedule": diffusion.schedule, **diffusion.schedule_shape}
        return [
            self._record(
                RECORDS[name], value, n=len(found.t), seeds=[self.request.seed], measured={"t": "uniform", **process}
            )
            for name, value in found.over_all().items()
        ]

    def _memorisation(self) -> EvalRecord:
        """How near samples are to training images in pixels, against held-out images of the same number."""
        assert self.request.train_data is not None
        train = ShardDataset(self.request.train_data)
        parts = sample_chunks(
            [self.subject.stage(self.request.sampling)], range(NEIGHBOUR_SAMPLES), seed=self.request.seed,
            batch=NEIGHBOUR_SAMPLES, device=self.subject.device, chunks=Chunks(), title=self._title("a few samples"),
        )  # fmt: skip
        samples = torch.from_numpy(concatenated(parts)["images"]).permute(0, 3, 1, 2)  # [k, C, H, W]
        held_out = torch.from_numpy(self.dataset.read(spread(len(self.dataset), NEIGHBOUR_SAMPLES))[0])
        every = nearest(torch.cat([samples, held_out]), train, title=self._title("nearest training images"))
        found, theirs = every.split(NEIGHBOUR_SAMPLES)
        if self.artifacts is not None:
            neighbour_figure(samples, train, found, self.artifacts / "nearest_training_images.png")
        result = memorisation(found, theirs, space="pixels")
        return self._record(
            MEMORISATION, Measured(result.ratio, None, asdict(result)), n=NEIGHBOUR_SAMPLES, seeds=[self.request.seed],
            measured={"train_data": train.manifest.fingerprint, **samples_said(self.request.sampling)},
        )  # fmt: skip

    def _quality(self) -> list[EvalRecord]:
        """One record a metric of samples: over the repeats its mean and the standard error of that."""
        request = self.request
        net = get_feature_net(request.feature_net, device=str(self.subject.device), weights=request.feature_weights)
        reference = self._reference(net)
        check_gives(
            reference.stats, request.kinds, has_rows=reference.rows is not None, whose="the reference",
            is_reference=True,
        )  # fmt: skip
        floor = self._floor(net)
        seeds = [request.seed + repeat for repeat in range(request.repeats)]
        device = str(self.subject.device)
        values = [quality(self._samples(net, seed), reference, request.kinds, device=device) for seed in seeds]
        measured = {
            "feature_net": net.name,
            "feature_weights_sha256": net.weights_sha256,
            "resize": net.resize,
            **samples_said(request.sampling),
            "num_reference": reference.num,
            "reference": reference.data,
        }
        return [
            self._record(
                record_name(kind, net.name), over_repeats([v[kind] for v in values]), n=request.num_samples,
                seeds=seeds, measured=measured, extra={"floor": floor[kind].value} if kind in floor else {},
            )
            for kind in request.kinds
        ]  # fmt: skip

    def _reference(self, net: FeatureNet) -> FeatureSet:
        """What samples are compared with: published statistics, or images of the split."""
        request = self.request
        rows = need_rows(request.kinds)
        if request.reference is not None:
            return published_features(
                request.reference, net, with_rows=rows, cache=self._cache, title=self._title("reference")
            )
        return reference_features(
            self.dataset, net, num=request.num_reference, with_rows=rows, cache=self._cache, chunks=self.chunks,
            title=self._title(f"features of {self.dataset.manifest.split} images"),
        )  # fmt: skip

    def _floor(self, net: FeatureNet) -> dict[str, Measured]:
        """Real against real at the same N: what samples as good as the data would get; none for too small a split."""
        num = self.request.num_samples
        kinds = [kind for kind in self.request.kinds if kind != "is"]
        if len(self.dataset) < 2 * num or not kinds:
            return {}
        title = self._title("features, real against real")
        return real_floor(self.dataset, net, kinds, num=num, cache=self._cache, chunks=self.chunks, title=title)

    @property
    def _cache(self) -> Path | None:
        """Beside the data; where that cannot be written to, what is there is used all the same."""
        folder = Path(self.request.data) / ".features"
        return folder if folder.exists() or os.access(folder.parent, os.W_OK) else None

    def _samples(self, net: FeatureNet, seed: int) -> FeatureSet:
        """Features of the samples of one seed; the images themselves are kept of the first few alone."""
        request, stage = self.request, self.subject.stage(self.request.sampling)
        parts = cut(request.num_samples, request.batch)

        def make(number: int, advance: Advance) -> Arrays:
            numbers = range(parts[number].start, parts[number].stop)
            images = sample(
                stage, numbers, seed=seed, device=self.subject.device, progress=lambda: advance(len(numbers))
            )  # [n, C, H, W]
            arrays = feature_arrays(net(images))
            kept = images[: max(0, GRID_IMAGES - numbers.start)]
            return arrays | {"images": kept.numpy()} if len(kept) else arrays

        results = self.chunks.results(
            f"samples{seed}", len(parts), make, unit="call", title=self._title(f"samples, seed {seed}"),
            work=lambda number: (parts[number].stop - parts[number].start) * stage.num_calls,
            final=seed == request.seed + request.repeats - 1,
        )  # fmt: skip
        return gather(
            net, self._drawn(results, seed), data=self.subject.sha256, num=request.num_samples,
            with_rows=need_rows(request.kinds),
        )  # fmt: skip

    def _drawn(self, parts: Iterator[Arrays], seed: int) -> Iterator[Arrays]:
        """The chunks as they are; what images they carry become a grid."""
        images = []
        for part in parts:
            if "images" in part:
                images.append(part.pop("images"))
            yield part
        if self.artifacts is not None:
            path = self.artifacts / f"samples_seed{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_grid(torch.from_numpy(np.concatenate(images)), path)

    def _record(
        self, metric: str, found: Measured, *, n: int, seeds: list[int], measured: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> EvalRecord:  # fmt: skip
        info, weights = self.subject.export.info, self.request.weights
        ensemble = self.request.ensemble
        both = {} if ensemble is None else {"ensemble_below": ensemble.below}
        made = self.subject.export.reconstruction(weights)
        origin = {} if made is None else {"reconstructed": made}
        return EvalRecord(
            metric=metric,
            split=self.dataset.manifest.split,
            value=found.value,
            stderr=found.stderr,
            n=n,
            seeds=seeds,
            measured={**measured, "weights": weights, **both},
            details=found.details | (extra or {}) | origin | {"computed_on": computed_on(self.subject.device)},
            data=self.dataset.manifest.fingerprint,
            weights=self.subject.sha256,
            run=info["run"],
            nimg=info["nimg"],
            compute=info["compute"],
            num_params=info["num_params"],
            flops_per_image=info["flops_per_image"],
            seed=info["seed"],
        )


def over_repeats(values: list[Measured]) -> Measured:
    """The mean over sets of samples, with its standard error; of a single set, its own."""
    if len(values) == 1:
        return values[0]
    numbers = np.array([value.value for value in values])
    stderr = float(numbers.std(ddof=1) / np.sqrt(len(numbers)))
    return Measured(float(numbers.mean()), stderr, values[0].details | {"repeats": numbers.tolist()})
