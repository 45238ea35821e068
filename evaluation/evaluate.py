"""Evaluate an export: likelihood and sample quality, as records.

    python -m evaluation.evaluate RUN/exports/000000008192 --data data/cifar10/test --metrics nll,fd
    torchrun --nproc-per-node 8 -m evaluation.evaluate -- EXPORT --data data/imagenet64/test --metrics nll

Prints a table of the metrics (--json: the records), writes the records beside the run (RUN/evals) or to --out, with
pictures and arrays in a folder of the same name, and sends them to MLflow (unless told --no-mlflow). Processes share
the work (a launcher's, or those told their --shard); an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from evaluation.chunks import Chunks, FinishedElsewhere, Shard, shard_of
from evaluation.device import pick_device
from evaluation.ensemble import Ensemble
from evaluation.measure import Evaluation
from evaluation.nll.settings import NllSettings
from evaluation.report.tables import metrics_table
from evaluation.request import MEMORISATION, EvalRequest
from evaluation.results import (
    artifacts_of,
    check_out,
    chunks_of,
    holds,
    key_of,
    result_path,
    run_of,
    send_to_mlflow,
    write_records,
    write_table,
)  # fmt: skip
from evaluation.sampling_options import add_network_options, network_sampling_of
from evaluation.subject import check_data, check_kind, open_subject
from trainer.diffusion.respacing import count_timesteps
from trainer.export import Export, open_export
from trainer.guiding import check_guide
from trainer.sampling import check_guidance
from trainer.tracking.records import EvalRecord, read_result


def evaluate(
    export: Path | Export, request: EvalRequest, *, chunks: Chunks | None = None, artifacts: Path | None = None,
    progress: bool = True,
) -> list[EvalRecord]:  # fmt: skip
    """Measure an export, opened or not; one record a metric.

    Args:
        chunks: the work, where it is shared with other processes or may be interrupted; default: all here, in memory.
        artifacts: folder for pictures and arrays; None for none.

    Raises:
        UserError: no export or data there, images of another size than the network's, unknown metrics, sampling steps
            that the network's process has not.
        FinishedElsewhere: another process has written the result.
    """
    request.check()
    request.check_data()
    opened = open_export(export) if isinstance(export, Path) else export
    dataset = ShardDataset(request.data)
    _check_fits(opened, dataset, request)
    device = pick_device(request.num_threads)
    subject = open_subject(opened, weights=request.weights, device=device, ensemble=request.ensemble)
    return Evaluation(subject, dataset, request, chunks or Chunks(), artifacts=artifacts, progress=progress).records()


def _check_fits(export: Export, dataset: ShardDataset, request: EvalRequest) -> None:
    """Raises UserError for what this network or this data cannot give, before anything is loaded or computed."""
    check_kind(export.config, request.metrics)
    check_data(export.config, dataset)
    num_timesteps = export.config.diffusion.num_timesteps
    if request.kinds or MEMORISATION in request.metrics:
        count_timesteps(num_timesteps, request.sampling.respacing)
        check_guidance(export.config, request.sampling.guidance)
        check_guide(export.config, request.sampling)
    if request.nll.respacing:
        count_timesteps(num_timesteps, request.nll.respacing)


def evaluate_to(
    result: Path, export: Path | Export, request: EvalRequest, *, shard: Shard | None = None, progress: bool = True
) -> bool:
    """Measure an export and write the records to `result`, with other processes, after an interruption, or alone.

    Returns whether this process wrote them: it did not where they were there, or are the first process's to write.
    Raises UserError as `evaluate` does, and for a `result` that is another evaluation's.
    """
    request.check()
    opened = open_export(export) if isinstance(export, Path) else export
    shard, key = shard or Shard(), key_of(opened, request)
    result.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    if holds(result, key):
        return False
    chunks = Chunks(chunks_of(result, key), shard=shard, result=result)
    artifacts = artifacts_of(result) if shard.index == 0 else None
    try:
        records = evaluate(opened, request, chunks=chunks, artifacts=artifacts, progress=progress)
    except FinishedElsewhere:
        return False
    if shard.index == 0:
        write_records(result, key, records, request)
        chunks.remove()
        if (run := run_of(opened)) is not None and result.parent.parent == run / "evals":
            write_table(run)
    return shard.index == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Evaluate an export: likelihood (nll) and sample quality.",
        epilog="Metrics: nll; memorisation (nearest training images); of samples fd, sfd, is, kd, precision, recall, "
        "with Inception also by their names fid, sfid, kid. A distance in the features of another net than Inception "
        "is not FID and is named after its net. Of classifiers: accuracy.",
    )
    add = parser.add_argument
    add("export", type=Path, help="RUN/exports/<images seen>")
    add("--data", required=True, help="a data split, such as data/cifar10/test, or its URL")
    add("--metrics", default="nll", help="comma-separated, such as nll,fd")
    add("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    add("--seed", type=int, default=0)
    add("--ensemble", type=Path, help="another export, asked at timesteps below --ensemble-below")
    add("--ensemble-below", type=int, default=0, help="timestep of the whole process")
    nll = parser.add_argument_group("likelihood")
    nll.add_argument("--mode", choices=("importance", "uniform", "exact"), default="importance")
    nll.add_argument("--num-calls", type=int, default=2048, help="network calls of a sampled estimate: the budget")
    nll.add_argument("--target-stderr", type=float, help="stop at this standard error in bits/dim")
    nll.add_argument("--num-images", type=int, help="of an exact one, each takes all steps (default: the whole split)")
    nll.add_argument("--nll-respacing", help="the bound of a shorter chain, such as 100 or ddim50")
    nll.add_argument("--no-clip", action="store_true", help="do not bound the predicted x_0 to [-1, 1]")
    quality = parser.add_argument_group("samples")
    quality.add_argument("--num-samples", type=int, default=2048)
    quality.add_argument("--repeats", type=int, default=1, help="sets of samples, of seeds --seed, --seed + 1, ...")
    quality.add_argument("--batch", type=int, default=64, help="samples a network call")
    add_network_options(quality, sampler="ddim", respacing="50")
    quality.add_argument("--num-reference", type=int, help="real images to compare with (default: the whole split)")
    quality.add_argument("--reference", type=Path, help="npz of published statistics to compare with instead")
    quality.add_argument("--train-data", help="the split that was trained on, for memorisation")
    quality.add_argument("--feature-net", default="efflite0", help="efflite0 or inception")
    quality.add_argument("--feature-weights", type=Path, help="the feature net's weights file")
    accuracy = parser.add_argument_group("classifiers")
    accuracy.add_argument("--accuracy-calls", type=int, help="noisy images (default: as many as the split has)")
    run = parser.add_argument_group("running")
    run.add_argument("--shard", help="this process's part, such as 0/2 (default: as a launcher says)")
    run.add_argument("--num-threads", type=int, help="CPU threads")
    run.add_argument("--out", type=Path, help="file for the records (default: beside the run)")
    run.add_argument("--no-mlflow", action="store_true", help="do not send the records to MLflow")
    run.add_argument("--json", action="store_true", help="print the records instead of a table")
    return parser


def _request(a: argparse.Namespace) -> EvalRequest:
    if a.ensemble is None and a.ensemble_below:
        raise UserError(f"--ensemble-below {a.ensemble_below} is for --ensemble EXPORT; give both, or neither.")
    return EvalRequest(
        data=a.data, metrics=tuple(m for m in a.metrics.split(",") if m), weights=a.weights, seed=a.seed,
        ensemble=None if a.ensemble is None else Ensemble(a.ensemble, a.ensemble_below),
        nll=NllSettings(a.mode, a.num_calls, a.target_stderr, a.num_images, a.nll_respacing, not a.no_clip),
        num_samples=a.num_samples, repeats=a.repeats, batch=a.batch,
        sampling=network_sampling_of(a), num_reference=a.num_reference, reference=a.reference,
        feature_net=a.feature_net, feature_weights=a.feature_weights, train_data=a.train_data,
        accuracy_calls=a.accuracy_calls, num_threads=a.num_threads,
    )  # fmt: skip


def main() -> int:
    """The command line."""
    a = _parser().parse_args()
    shard, request = shard_of(a.shard), _request(a)
    request.check()
    export = open_export(a.export)
    result = a.out or result_path(export, request)
    if a.out is not None:
        check_out(a.out, key_of(export, request))
    written = evaluate_to(result, export, request, shard=shard)
    if written and not a.no_mlflow and a.out is None:
        send_to_mlflow(export)
    if shard.index != 0:
        print(f"part {shard.index} of {shard.count} is done; part 0 writes {result}", file=sys.stderr)
        return 0
    records = read_result(result)
    print(json.dumps([r.to_json() for r in records], indent=2) if a.json else metrics_table(records))
    print(f"records: {result}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
