"""Averages of any length, made after training from the snapshots of a few that were tracked:

    python -m trainer.posthoc_ema RUN --sigma-rel 0.03 0.07 0.15 [--ema-decay 0.9999] [--at 4194304]

RUN was trained with `train.ema_profiles` and `train.ema_snapshot_every_images`. The averages, named such as power_0.07
and ema_0.9999, go to RUN/posthoc_ema/<images seen>, an export that evaluations take with --weights power_0.07.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import UserError, run_cli
from data_pipeline.progress import progress_bar, say
from trainer.averages.fit import Fit, Stored, fit_exponential, fit_power
from trainer.averages.rules import SIGMA_REL_BOUND, Exponential, PowerProfile
from trainer.checkpoint import checkpoint_name, list_checkpoints, verify
from trainer.export import SUFFIX, Export, Weights, open_export, save_export
from trainer.run_folder import RunFolder

Target = PowerProfile | Exponential
MAX_ERROR = 0.1  # of a profile


@dataclass(frozen=True)
class Snapshots:
    """A run's stored averages up to a moment, which is that of the last of them."""

    last: Export
    stored: list[Stored]
    files: list[Path]  # beside `stored`

    @property
    def step(self) -> int:
        return max(s.step for s in self.stored)

    @property
    def num_moments(self) -> int:
        return len({s.step for s in self.stored})

    def fit(self, target: Target) -> Fit:
        """The sum of the stored averages that is nearest to an average."""
        if isinstance(target, PowerProfile):
            return fit_power(self.stored, target, self.step)
        return fit_exponential(self.stored, target, self.step)


def open_snapshots(run: Path, at: int | None = None) -> Snapshots:
    """Those of `run` up to `at` images; default: all. Damaged ones are named and left out.

    Raises UserError where there is no such run, where it has none, or none at `at` itself: what came after the last one
    is in none of them.
    """
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}; name the one that the run was given as run.folder=...")
    folder = RunFolder(run).ema_snapshots
    there = []
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            there.append(path)
        else:
            say(f"warning: snapshot {path.name} is left out: {problem}")
    if not there:
        raise UserError(
            f"{folder} holds no snapshots; train with train.ema_profiles=[0.05,0.1] and "
            "train.ema_snapshot_every_images=..., some 30 times within the budget."
        )
    moments = [int(path.name) for path in there]
    if at is not None and at not in moments:
        nearest = sorted(moments, key=lambda nimg: abs(nimg - at))[:4]
        raise UserError(
            f"--at {at}: {folder} has no snapshot at so many images; the nearest ones are at "
            f"{', '.join(map(str, sorted(nearest)))}."
        )
    stored, files = [], []
    for path in there[: moments.index(at) + 1 if at is not None else None]:
        last = open_export(path)
        step = int(path.name) // last.config.train.global_batch
        for name, profile in last.config.train.profiles.items():
            stored.append(Stored(profile, step))
            files.append(path / f"{name}{SUFFIX}")
    return Snapshots(last, stored, files)


def reconstruct(
    snapshots: Snapshots, targets: Mapping[Weights, Target], out: Path, *, max_error: float = MAX_ERROR
) -> dict[Weights, Fit]:
    """Write the export `out` of these averages, by name; the ones that it has already stay. Returns their fits.

    Its export.json says in `reconstructed`, by name, how far the profile is off and from how many snapshots it is.
    In memory is one parameter of one snapshot and its sum so far, in float64. Raises UserError where the profile of
    one is further than `max_error` from what the snapshots can make.
    """
    fits = {name: snapshots.fit(target) for name, target in targets.items()}
    poor = {name: fit.error for name, fit in fits.items() if fit.error > max_error}
    if poor:
        raise UserError(
            "these snapshots are too few, or their averages too far in length, for "
            + ", ".join(f"{name} (error {error:.2g})" for name, error in poor.items())
            + f": the profile would be off by more than {max_error:g} of its norm. Ask for lengths nearer to "
            "train.ema_profiles, allow more with --max-error, or train with a smaller train.ema_snapshot_every_images."
        )
    last = snapshots.last
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in snapshots.files]
        shapes = {name: tuple(files[0].get_slice(name).get_shape()) for name in files[0].keys()}  # noqa: SIM118
        bar = stack.enter_context(progress_bar(total=len(fits) * len(shapes), unit="tensor", description="averages"))
        weights: dict[Weights, Callable[[str], Tensor]] = {}
        there = _earlier(out, last)
        for kind in there.weights_sha256 if there is not None else ():
            weights[kind] = stack.enter_context(safe_open(out / f"{kind}{SUFFIX}", framework="pt")).get_tensor
        weights |= {kind: partial(_weighted_sum, files, fit.factors.tolist(), bar) for kind, fit in fits.items()}
        text = (last.path / "config.yaml").read_bytes()
        made = {
            kind: {"profile_error": fit.error, "num_snapshots": snapshots.num_moments} for kind, fit in fits.items()
        }
        earlier = there.info.get("reconstructed", {}) if there is not None else {}
        save_export(out, weights, shapes, config=text, info=last.info | {"reconstructed": earlier | made})
    return fits


def _earlier(out: Path, last: Export) -> Export | None:
    """What an earlier reconstruction at the same moment of the same run left in `out`."""
    if not out.exists():
        return None
    there = open_export(out)
    if (there.info["run"], there.info["nimg"]) != (last.info["run"], last.info["nimg"]):
        raise UserError(f"{out} is another run's export, or of another moment; choose another --out.")
    if there.config_sha256 != last.config_sha256:
        raise UserError(f"{out} was made under other settings of the run; remove it, or choose another --out.")
    return there


def _weighted_sum(files: Sequence[Any], factors: Sequence[float], bar: Any, name: str) -> Tensor:
    """A parameter's average: the sum over the stored ones, in float64, as float32."""
    total = torch.zeros(files[0].get_slice(name).get_shape(), dtype=torch.float64)
    for file, factor in zip(files, factors, strict=True):
        total.add_(file.get_tensor(name).double(), alpha=factor)
    bar.update(1)
    return total.float()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.posthoc_ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--sigma-rel", type=float, nargs="+", default=[], metavar="LENGTH",
                        help="relative standard deviations of power profiles, such as 0.03 0.07 0.15")  # fmt: skip
    parser.add_argument("--ema-decay", type=float, nargs="+", default=[], metavar="DECAY",
                        help="averages of constant decay a step, such as 0.9999")  # fmt: skip
    parser.add_argument("--at", type=int, metavar="IMAGES", help="a snapshot's moment (default: the last one's)")
    parser.add_argument("--out", type=Path, help="the export's folder (default: RUN/posthoc_ema/<images seen>)")
    parser.add_argument("--max-error", type=float, default=MAX_ERROR, metavar="SHARE",
                        help="of a profile's norm that it may be off by (default: %(default)g)")  # fmt: skip
    return parser.parse_args()


def _targets(args: argparse.Namespace) -> dict[Weights, Target]:
    for sigma_rel in args.sigma_rel:
        if not 0 < sigma_rel < SIGMA_REL_BOUND:
            raise UserError(
                f"--sigma-rel {sigma_rel:g} must be above 0 and below {SIGMA_REL_BOUND:.4f}, 1/sqrt(12): the length of "
                "the uniform average of all of training."
            )
    for decay in args.ema_decay:
        if not 0 <= decay < 1:
            raise UserError(f"--ema-decay {decay:g} must be from 0 to below 1, such as 0.9999.")
    powers: dict[Weights, Target] = {(p := PowerProfile(sigma_rel)).name: p for sigma_rel in args.sigma_rel}
    targets = powers | {f"ema_{decay:g}": Exponential(decay) for decay in args.ema_decay}
    if not targets:
        raise UserError("name the averages to be made, such as --sigma-rel 0.03 0.07 or --ema-decay 0.9999.")
    return targets


def main() -> int:
    """The command line."""
    args = _arguments()
    targets = _targets(args)
    snapshots = open_snapshots(args.run, args.at)
    out = args.out or RunFolder(args.run).posthoc_ema / checkpoint_name(snapshots.last.info["nimg"])
    fits = reconstruct(snapshots, targets, out, max_error=args.max_error)
    print(f"from {len(snapshots.stored)} stored averages; error of the profile, relative to its norm:")
    for name, fit in fits.items():
        print(f"  {name:14} {fit.error:.1e}")
    print(f"export: {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
