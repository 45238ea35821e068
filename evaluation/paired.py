"""Compare the likelihoods of several exports call by call: the same images, timesteps and noises for all.

    python -m evaluation.paired RUN/exports/000000004096 RUN/exports/000000008192 --data data/cifar10/test

What images and noises have in common drops out of the difference, so far fewer calls tell two checkpoints apart than
two estimates of their own would need. Prints each export's bound and every further one's difference to the first. The
result is kept in RUN/paired of the first export (EXPORT/paired where it belongs to no run); a comparison that was
interrupted, or is shared by processes, goes on from the chunks beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from evaluation.chunks import Chunks, FinishedElsewhere, shard_of
from evaluation.device import pick_device
from evaluation.nll.plan import Plan
from evaluation.nll.rounds import Drawn, Look, bound, differences, draw
from evaluation.nll.settings import NllSettings
from evaluation.nll.summary import Mean
from evaluation.nll.terms import NetworkTerms, Terms
from evaluation.request import DEFINITION, EvalRequest
from evaluation.results import chunks_of, holds, run_of
from evaluation.subject import Subject, check_kind, open_subject, weights_identity


def compare(
    subjects: Sequence[Subject], dataset: ShardDataset, settings: NllSettings, *, seed: int = 0,
    chunks: Chunks | None = None, title: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Each network's bound and its difference to the first one's, in bits/dim with standard errors.

    `settings.target_stderr` is asked of every difference. p comes from the squares of all pilots, pooled.

    Raises:
        UserError: fewer than two exports, chains of different lengths, data that does not fit, an exact sweep.
        FinishedElsewhere: the result is another process's to write: this one, not the first, has done its part.
    """
    num_timesteps = _check(subjects, dataset, settings)
    looks: list[Look] = []  # the first process writes the result: the others leave when theirs is done
    for number, subject in enumerate(subjects):
        terms = NetworkTerms(
            subject.condition, subject.diffusion(settings.respacing), dataset, seed, subject.device,
            settings.clip_denoised, chunks or Chunks(), title and f"{title}{subject.export.path.name}",
        )  # fmt: skip
        looks.append(partial(_look, terms, number))
    drawn = draw(
        looks, settings, num_timesteps, len(dataset), seed=seed, stderr=partial(_largest_error, len(dataset)),
        final=True,
    )  # fmt: skip
    return _result(subjects, drawn, dataset, settings, seed)


def _check(subjects: Sequence[Subject], dataset: ShardDataset, settings: NllSettings) -> int:
    """The number of steps of all the chains."""
    settings.check()
    if settings.mode == "exact":
        raise UserError("--mode exact: exact sweeps are compared by their values; a paired estimate is sampled.")
    if len(subjects) < 2:
        raise UserError("one export is named; a comparison needs two or more.")
    for subject in subjects:
        subject.check_data(dataset)
    steps = [subject.diffusion(settings.respacing).num_timesteps for subject in subjects]
    if len(set(steps)) > 1:
        each = ", ".join(f"{s.export.path} {n}" for s, n in zip(subjects, steps, strict=True))
        raise UserError(
            f"the chains have different numbers of steps ({each}), so they have no timesteps in common; compare them "
            "with --nll-respacing, such as 100, or by evaluation.evaluate one by one."
        )
    return steps[0]


def _look(terms: NetworkTerms, number: int, plan: Plan, kind: str, final: bool) -> Terms:
    return terms(plan, f"{kind}-network{number}", final)


def _largest_error(num_images: int, drawn: Drawn) -> float:
    return max(difference.stderr or 0.0 for difference in differences(drawn, num_images))


def _result(
    subjects: Sequence[Subject], drawn: Drawn, dataset: ShardDataset, settings: NllSettings, seed: int
) -> dict[str, Any]:  # fmt: skip
    size = len(dataset)
    bounds = [bound(drawn, size, network) for network in range(len(subjects))]
    rows: list[dict[str, Any]] = [{"nll": _json(mean)} for mean in bounds]
    for row, mean, difference in zip(rows[1:], bounds[1:], differences(drawn, size), strict=True):
        # Two estimates of their own would have independent errors.
        apart = math.hypot(bounds[0].stderr or 0.0, mean.stderr or 0.0)
        row["difference"] = _json(difference)
        row["stderr_unpaired"] = apart
        row["shrunk"] = apart / difference.stderr if difference.stderr else None
    exports = [
        {"export": str(s.export.path), "weights": s.weights, "weights_sha256": s.sha256, **row}
        for s, row in zip(subjects, rows, strict=True)
    ]
    return {
        "exports": exports,
        "data": dataset.manifest.fingerprint,
        "split": dataset.manifest.split,
        "settings": asdict(settings),
        "seed": seed,
        "num_calls": len(drawn.plan) + drawn.num_pilot,  # of each network
        "num_rounds": drawn.num_rounds,
    }


def _json(mean: Mean) -> dict[str, Any]:
    return asdict(mean) | {"interval95": mean.interval95}


def _key(subjects: Sequence[Subject], dataset: ShardDataset, settings: NllSettings, seed: int) -> str:
    content = [
        DEFINITION,
        [weights_identity(s.export, s.weights) for s in subjects],
        dataset.manifest.fingerprint,
        asdict(settings),
        seed,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def table(result: dict[str, Any]) -> str:
    """The result in lines to read."""
    lines = []
    for row in result["exports"]:
        nll, difference = row["nll"], row.get("difference")
        line = f"{row['export']} ({row['weights']}): {nll['value']:.4f} ± {nll['stderr']:.4f} bits/dim"
        if difference is not None:
            line += f"; to the first {difference['value']:+.5f} ± {difference['stderr']:.5f}"
            line += f" (pairing: {row['shrunk']:.1f} times smaller)" if row["shrunk"] else " (no error is left)"
        lines.append(line)
    calls, rounds = result["num_calls"], result["num_rounds"]
    lines.append(
        f"{calls:,} calls of each network in {rounds} round{'s' if rounds > 1 else ''}, {result['split']} split"
    )
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the likelihoods of exports on the same images and noises.")
    parser.add_argument("exports", type=Path, nargs="+", help="two or more of RUN/exports/<images seen>")
    parser.add_argument("--data", required=True, help="a data split, such as data/cifar10/test, or its URL")
    parser.add_argument("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    parser.add_argument("--num-calls", type=int, default=2048, help="network calls for each export: the budget")
    parser.add_argument("--target-stderr", type=float, help="stop when all differences are this sure, in bits/dim")
    parser.add_argument("--nll-respacing", help="the bound of a shorter chain, such as 100 or ddim50")
    parser.add_argument("--mode", choices=("importance", "uniform"), default="importance", help="how t is drawn")
    parser.add_argument("--no-clip", action="store_true", help="do not bound the predicted x_0 to [-1, 1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", help="this process's part, such as 0/2 (default: a launcher's RANK and WORLD_SIZE)")
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    a = parser.parse_args()
    settings = NllSettings(
        mode=a.mode, num_calls=a.num_calls, target_stderr=a.target_stderr, respacing=a.nll_respacing,
        clip_denoised=not a.no_clip,
    )  # fmt: skip
    # As an evaluation of each would be refused.
    EvalRequest(data=a.data, weights=a.weights, seed=a.seed, nll=settings, num_threads=a.num_threads).check()
    device, dataset, shard = pick_device(a.num_threads), ShardDataset(a.data), shard_of(a.shard)
    subjects = [open_subject(path, weights=a.weights, device=device) for path in a.exports]
    for subject in subjects:
        check_kind(subject.export.config, ["nll"])
    _check(subjects, dataset, settings)
    first = subjects[0].export
    key = _key(subjects, dataset, settings, a.seed)
    path = (run_of(first) or first.path.resolve()) / "paired" / f"{key}.json"
    if not holds(path, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = Chunks(chunks_of(path, key), shard=shard, result=path)
        try:
            found = compare(subjects, dataset, settings, seed=a.seed, chunks=chunks, title="nll ")
        except FinishedElsewhere:
            return 0
        if shard.index == 0:
            write_json(path, {"key": key, **found})
            chunks.remove()
    if shard.index == 0:
        result = json.loads(path.read_text())
        print(json.dumps(result, indent=2) if a.json else table(result))
    return 0


if __name__ == "__main__":
    run_cli(main)
