"""Evaluate an export: likelihood and sample quality, as records.

    python -m evaluation.evaluate RUN/exports/000000008192 --data data/cifar10/test --metrics nll,fd

Prints the records as JSON, writes them beside the run (RUN/evals) or to --out, and sends them to MLflow when the run
has been sent there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.manifest import Manifest
from data_pipeline.progress import progress_bar
from evaluation.features import FeatureNet, get_feature_net, metric_name
from evaluation.features.reference import reference_stats, split_floor, stats_of_images
from evaluation.metrics.frechet import frechet_distance
from evaluation.nll.estimate import Mode, estimate_nll
from evaluation.nll.plan import check_num_calls
from trainer.config import SamplingConfig, validate
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.respacing import space_timesteps
from trainer.export import Export, Weights, open_export
from trainer.sampling import Stage, conditioned, sample
from trainer.tracking.records import EvalRecord

METRICS = ("nll", "fd")
SAMPLE_BATCH = 32


@dataclass(frozen=True)
class EvalRequest:
    """What to measure of an export."""

    data: Path  # a data split
    metrics: tuple[str, ...] = ("nll",)
    weights: Weights = "ema"
    seed: int = 0
    nll_mode: Mode = "importance"
    num_calls: int = 2048  # network calls of an importance-sampled NLL
    num_images: int = 4  # images of an exact one
    num_samples: int = 2048  # for the Fréchet distance
    num_reference: int | None = None  # real images it is compared with; default: the whole split
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    feature_net: str = "efflite0"
    num_threads: int | None = None

    def key(self, weights_sha256: str) -> str:
        """Names the evaluation of these weights: equal requests have equal keys, whoever asks."""
        content = {
            "metrics": {metric: self.settings(metric) for metric in self.metrics},
            "weights": self.weights,
            "seed": self.seed,
            "data": Manifest.load(self.data).fingerprint,
            "weights_sha256": weights_sha256,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self, metric: str) -> dict[str, Any]:
        """What the value of this metric depends on: only this names it."""
        if metric == "fd":
            names = ["num_samples", "num_reference", "feature_net"]
            return {name: getattr(self, name) for name in names} | {"sampling": self.sampling.model_dump()}
        size = "num_calls" if self.nll_mode == "importance" else "num_images"
        return {"mode": self.nll_mode, size: getattr(self, size)}

    def check(self) -> None:
        """Raises UserError for what cannot be measured, before anything is computed."""
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown or not self.metrics:
            raise UserError(f"unknown metric {', '.join(unknown) or '(none)'}; known: {', '.join(METRICS)}.")
        if "nll" in self.metrics and self.nll_mode == "importance":
            check_num_calls(self.num_calls)
        for name, least in (("num_images", 1), ("seed", 0), ("num_reference", 2), ("num_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small; use {least} or more.")
        if "fd" in self.metrics and self.num_samples < 2:
            raise UserError(f"--num-samples {self.num_samples}: a Fréchet distance needs at least 2 samples.")


def evaluate(export: Path | Export, request: EvalRequest, *, progress: bool = True) -> list[EvalRecord]:
    """Measure an export, opened or not; one record a metric.

    Raises:
        UserError: no export or data there, images of another size than the network's, unknown metrics, sampling steps
            that the network's process has not.
    """
    request.check()
    if isinstance(export, Path):
        export = open_export(export)
    dataset = ShardDataset(request.data)
    _check_fits(export, dataset, request)
    if request.num_threads:
        torch.set_num_threads(request.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = export.network(request.weights).to(device)
    measures: dict[str, Callable[..., EvalRecord]] = {"nll": _nll, "fd": _fd}
    return [measures[metric](export, network, dataset, request, device, progress) for metric in request.metrics]


def _check_fits(export: Export, dataset: ShardDataset, request: EvalRequest) -> None:
    """Raises UserError for what this network or this data cannot give, before anything is computed."""
    model, there = export.config.model, dataset.manifest
    if model.low_res_size:
        raise UserError(
            "a super-resolution network has no likelihood or samples of its own; see what it makes of a base network's "
            "images: `python -m evaluation.sample BASE UPSAMPLER --out samples.npz`."
        )
    if there.image_size != model.image_size:
        raise UserError(
            f"the network makes {model.image_size}x{model.image_size} images, those in {request.data} are "
            f"{there.image_size}x{there.image_size}; name a split of the network's size."
        )
    if model.num_classes not in (0, there.num_classes):
        raise UserError(
            f"the network knows {model.num_classes} classes, {request.data} has {there.num_classes}; name a split with "
            "the classes it was trained on."
        )
    if request.num_reference and request.num_reference > len(dataset):
        raise UserError(f"--num-reference {request.num_reference}: {request.data} has {len(dataset)} images.")
    if "fd" in request.metrics:
        space_timesteps(export.config.diffusion.num_timesteps, request.sampling.respacing)


def _nll(
    export: Export, network: torch.nn.Module, dataset: ShardDataset, request: EvalRequest, device: torch.device,
    progress: bool,
) -> EvalRecord:  # fmt: skip
    diffusion = GaussianDiffusion.create(export.config.diffusion, device)

    def condition(labels: NDArray[np.int64]) -> Denoiser:
        return conditioned(network, torch.from_numpy(labels).to(device) if export.config.model.num_classes else None)

    estimate = estimate_nll(
        condition, diffusion, dataset,
        mode=request.nll_mode, num_calls=request.num_calls, num_images=request.num_images, seed=request.seed,
        device=device, progress=f"nll {dataset.manifest.split}" if progress else "",
    )  # fmt: skip
    return _record(
        export, request, dataset, metric="nll", value=estimate.bits_per_dim, stderr=estimate.stderr,
        n=estimate.num_calls, measured=estimate.measured, details=estimate.details(),
    )  # fmt: skip


def _fd(
    export: Export, network: torch.nn.Module, dataset: ShardDataset, request: EvalRequest, device: torch.device,
    progress: bool,
) -> EvalRecord:  # fmt: skip
    net = get_feature_net(request.feature_net, device=str(device))
    cache = request.data / ".features" if os.access(request.data, os.W_OK) else None
    reference = reference_stats(dataset, net, num=request.num_reference, cache=cache, progress=progress)
    samples = stats_of_images(
        net, _sample_batches(export, network, request, device, progress), data=export.weights_sha256[request.weights]
    )
    measured: dict[str, Any] = {
        "feature_net": net.name,
        "feature_weights_sha256": net.weights_sha256,
        "resize": net.resize,
        **request.sampling.model_dump(),
        "num_reference": reference.num,
    }
    return _record(
        export, request, dataset, metric=metric_name(net), value=frechet_distance(samples, reference), stderr=None,
        n=request.num_samples, measured=measured, details={"floor": _floor(dataset, net, request, cache)},
    )  # fmt: skip


def _floor(dataset: ShardDataset, net: FeatureNet, request: EvalRequest, cache: Path | None) -> float | None:
    """Real against real at the same N: what samples as good as the data would get; None for too small a split."""
    if len(dataset) < 2 * request.num_samples:
        return None
    return split_floor(dataset, net, num=request.num_samples, cache=cache).value


def _sample_batches(
    export: Export, network: torch.nn.Module, request: EvalRequest, device: torch.device, progress: bool
) -> Iterator[torch.Tensor]:
    stage = Stage(network, export.config, request.sampling)
    calls = request.num_samples * stage.num_calls
    with progress_bar(total=calls, unit="call", description="samples", disable=not progress) as bar:
        for start in range(0, request.num_samples, SAMPLE_BATCH):
            seeds = range(start, min(start + SAMPLE_BATCH, request.num_samples))
            yield sample(stage, seeds, seed=request.seed, device=device, progress=partial(bar.update, len(seeds)))


def _record(
    export: Export, request: EvalRequest, dataset: ShardDataset, *, metric: str, value: float, stderr: float | None,
    n: int, measured: dict[str, Any], details: dict[str, Any],
) -> EvalRecord:  # fmt: skip
    info = export.info
    return EvalRecord(
        metric=metric,
        split=dataset.manifest.split,
        value=value,
        stderr=stderr,
        n=n,
        seeds=[request.seed],
        measured={**measured, "weights": request.weights},
        details=details,
        data=dataset.manifest.fingerprint,
        weights=export.weights_sha256[request.weights],
        run=info["run"],
        nimg=info["nimg"],
        compute=info["compute"],
        num_params=info["num_params"],
        flops_per_image=info["flops_per_image"],
        seed=info["seed"],
    )


def result_path(export: Export, request: EvalRequest) -> Path:
    """Where the records of this evaluation are kept: RUN/evals/<nimg>/<key>.json, or EXPORT/evals/<key>.json.

    The latter for an export that belongs to no run: an imported one, or one that was copied away. Raises UserError
    when the export holds no such weights.
    """
    export.check_holds(request.weights)
    name = f"{request.key(export.weights_sha256[request.weights])}.json"
    folder = export.path.resolve()
    run = folder.parent.parent
    return (run / "evals" / folder.name if (run / "run.json").exists() else folder / "evals") / name


def write_records(path: Path, records: Sequence[EvalRecord], request: EvalRequest) -> None:
    """Write an evaluation's records and its request, atomically."""
    spec = asdict(request) | {"data": str(request.data), "sampling": request.sampling.model_dump()}
    write_json(path, {"records": [r.to_json() for r in records], "spec": spec})


def send_to_mlflow(export: Export) -> None:
    """Mirror the run's records to where its config says; a tracker that is down costs a warning, no result."""
    tracking = export.config.tracking
    run = export.path.resolve().parent.parent
    if not (run / "run.json").exists():
        return  # an export that was copied away from its run
    environment = dict(os.environ) | ({"MLFLOW_TRACKING_URI": tracking.uri} if tracking.uri else {})
    command = [sys.executable, "-m", "trainer.tracking.mlflow_sync", str(run), "--experiment", tracking.experiment]
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        print("warning: MLflow was not reached; the records are in the run folder.", file=sys.stderr)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate an export: likelihood (nll) and sample quality (fd).")
    parser.add_argument("export", type=Path, help="RUN/exports/<images seen>")
    parser.add_argument("--data", type=Path, required=True, help="a data split, such as data/cifar10/test")
    parser.add_argument("--metrics", default="nll", help="comma-separated: nll, fd")
    parser.add_argument("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    parser.add_argument("--mode", choices=("importance", "exact"), default="importance", help="of the NLL")
    parser.add_argument("--num-calls", type=int, default=2048, help="network calls of an importance-sampled NLL")
    parser.add_argument("--num-images", type=int, default=4, help="images of an exact NLL (each takes T calls)")
    parser.add_argument("--num-samples", type=int, default=2048, help="samples for the Fréchet distance")
    parser.add_argument("--num-reference", type=int, help="real images to compare with (default: the whole split)")
    parser.add_argument("--sampler", choices=("ddim", "ancestral"), default="ddim")
    parser.add_argument("--respacing", default="50", help="sampling steps: 50, 10,15,20, ddim50 or quadratic50")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="file for the records (default: beside the run)")
    parser.add_argument("--no-mlflow", action="store_true", help="do not send the records to MLflow")
    a = parser.parse_args()
    how = {"sampler": a.sampler, "respacing": a.respacing, "eta": a.eta}
    sampling = validate(SamplingConfig, how, source="arguments")
    request = EvalRequest(
        data=a.data, metrics=tuple(m for m in a.metrics.split(",") if m), weights=a.weights, seed=a.seed,
        nll_mode=a.mode, num_calls=a.num_calls, num_images=a.num_images, num_samples=a.num_samples,
        num_reference=a.num_reference, sampling=sampling, num_threads=a.num_threads,
    )  # fmt: skip
    request.check()
    export = open_export(a.export)
    export.check_holds(request.weights)
    out = a.out or result_path(export, request)
    out.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    records = evaluate(export, request)
    write_records(out, records, request)
    if not a.no_mlflow and a.out is None:
        send_to_mlflow(export)
    json.dump([r.to_json() for r in records], sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    run_cli(main)
