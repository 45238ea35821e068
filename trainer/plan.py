"""What a run will do and need, before it is started:

    python -m trainer.plan --config configs/runs/imagenet64/hybrid.yaml --processes 8 [section.key=value ...]

Images, steps, exports, checkpoints and their disk space; time at a stated share of a device's peak; and the memory of
each device for this run's choices and for others, with the largest micro-batch that fits into --device-memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError, run_cli
from data_pipeline.words import size
from trainer.checkpoint import kept_for_good
from trainer.config.run import RunConfig, load_config
from trainer.engine import split_batch
from trainer.memory import FLOAT, Memory, largest_that_fits, memory_of
from trainer.micro_batch import USABLE
from trainer.milestones import Milestones
from trainer.models import ModelCost, count

GB = 1e9


@dataclass(frozen=True)
class Choice:
    """One way to run the same training, and its memory."""

    own: bool  # the config's own
    zero_stage: int
    checkpointing: bool
    precision: str
    offload: bool
    memory: Memory  # at the run's own micro-batch
    largest_micro_batch: int | None  # that fits; None where not one image does, or no limit is known


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves behind."""

    export: float
    checkpoint: float
    num_exports: int
    num_saves: int  # checkpoints written in all
    num_kept: int  # of them, at the end
    snapshot: float  # of the averages of power profile
    num_snapshots: int

    @property
    def peak(self) -> float:
        """With one more checkpoint while the newest is being written."""
        for_good = self.num_exports * self.export + self.num_snapshots * self.snapshot
        return for_good + (self.num_kept + 1) * self.checkpoint


def disk_of(config: RunConfig, plan: Milestones, cost: ModelCost) -> Disk:
    """Exports hold the weights and their averages, checkpoints also two moments, all in float32.

    Snapshots hold the averages of power profile alone.
    """
    train = config.train
    saves, snapshots = plan.all_saves, plan.all_snapshots
    newest = set(sorted(saves)[-train.keep_checkpoints :])
    num_kept = len(kept_for_good(saves, train.keep_every_images) | newest)
    tensors, params = 1 + len(train.averages), FLOAT * cost.num_params
    share = 0.5 if train.ema_snapshot_precision == "fp16" else 1.0
    return Disk(
        params * tensors, params * (tensors + 2), len(plan.exports), len(saves), num_kept,
        snapshot=share * params * len(train.profiles), num_snapshots=len(snapshots),
    )  # fmt: skip


def choices(config: RunConfig, num_processes: int, *, limit: float | None, device: str) -> list[Choice]:
    """The run's own choice among those it could have made, in the order of ZeRO stages."""

    def choice(**changes: Any) -> Choice:
        engine = config.engine.model_copy(update=changes)
        changed = config.model_copy(update={"engine": engine})
        return Choice(
            own=engine == config.engine, zero_stage=engine.zero_stage, checkpointing=engine.activation_checkpointing,
            precision=engine.precision, offload=engine.offload_optimizer,
            memory=memory_of(changed, num_processes, device=device),
            largest_micro_batch=largest_that_fits(changed, num_processes, limit, device=device) if limit else None,
        )  # fmt: skip

    return [choice(**changes) for changes in _variations(config)]


def _variations(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Every stage with and without checkpointing; then, at the run's own stage, another precision and offloading."""
    own = config.engine
    for stage in (0, 1, 2, 3):
        for checkpointing in (False, True):
            change = {"zero_stage": stage, "activation_checkpointing": checkpointing}
            yield change | ({"offload_optimizer": False} if stage == 0 else {})
    yield {"precision": "bf16" if own.precision == "fp32" else "fp32"}
    if own.zero_stage:
        yield {"offload_optimizer": not own.offload_optimizer}


def plan_text(
    config: RunConfig, num_processes: int, *, mfu: float, peak: float, limit: float | None, device: str
) -> str:  # fmt: skip
    """The whole plan, at most 110 columns wide; `limit`: bytes of a device, `peak`: its FLOP/s."""
    cost = count(config.model, config.diffusion)
    plan = Milestones.create(config, cost)
    disk = disk_of(config, plan, cost)
    micro, accumulation = split_batch(config, num_processes)
    compute = plan.total * cost.train_flops
    hours = compute / (peak * mfu) / 3600
    steps = plan.total // config.train.global_batch
    kept_for_good = config.train.keep_every_images
    lines = [
        f"run {config.name}: {config.run.folder}",
        "",
        f"network      {cost.num_params:,} parameters",
        f"             {cost.train_flops:.4g} FLOP to train on an image (3 x forward, 2 per multiply-add)",
        f"training     {plan.total:,} images in {steps:,} steps of {config.train.global_batch}, "
        f"{compute:.3e} FLOP in all",
        f"             on {num_processes} process{'es' if num_processes > 1 else ''}, each of which computes "
        f"{accumulation} x {micro} images a step",
        f"time         {hours:,.3g} device-hours if it reaches {mfu:.0%} of {peak / 1e12:,.4g} TFLOP/s: "
        f"{_duration(3600 * hours / num_processes)} on {num_processes}",
        f"exports      {disk.num_exports}, at {_some(sorted(plan.exports))} images: {size(disk.export)} each",
        f"checkpoints  {disk.num_saves} written, {size(disk.checkpoint)} each; kept: the newest "
        f"{config.train.keep_checkpoints}" + (f", and one every {kept_for_good:,} images" if kept_for_good else ""),
        *_snapshot_lines(config, plan, disk),
        f"disk         {size(disk.peak)} at most, samples and metrics apart",
        "",
        *_memory_lines(choices(config, num_processes, limit=limit, device=device), micro, limit),
    ]
    return "\n".join(lines)


def _snapshot_lines(config: RunConfig, plan: Milestones, disk: Disk) -> list[str]:
    if plan.ema_snapshot_every is None:
        return []
    return [
        f"snapshots    {disk.num_snapshots}, of {', '.join(config.train.profiles)}: {size(disk.snapshot)} each, every "
        f"{plan.ema_snapshot_every:,} images and at the end"
    ]


_COLUMNS = (
    f"{'':2}{'ZeRO':>4} {'recompute':>9} {'prec':4} {'offload':>7} {'weights':>8} {'gradients':>9} {'optimizer':>9} "
    f"{'average':>7} {'buckets':>7} {'activations':>11} {'total':>7} {'host':>7} {'largest':>7}"
)


def _memory_lines(rows: Sequence[Choice], micro: int, limit: float | None) -> list[str]:
    largest = f"largest: micro-batch that fits into {limit / GB:.4g} GB" if limit else "--device-memory GB: what fits"
    notes = [
        "recompute: engine.activation_checkpointing. total: the most at once on the device; 8 % of --device-memory is",
        "left for CUDA itself and kernels' workspaces. host: offloaded state, and a checkpoint's snapshot while it is",
        "written. Reckoned for eager execution: torch.compile mostly needs less.",
    ]
    return [
        f"memory of each process in GB at micro-batch {micro} (*: this run); {largest}",
        "",
        _COLUMNS,
        *(_row(choice, limit) for choice in rows),
        "",
        *notes,
    ]


def _row(choice: Choice, limit: float | None) -> str:
    m = choice.memory
    largest = "" if limit is None else str(choice.largest_micro_batch or "none")
    return (
        f"{'*' if choice.own else '':2}{choice.zero_stage:>4} {'yes' if choice.checkpointing else 'no':>9} "
        f"{choice.precision:4} {'yes' if choice.offload else 'no':>7} {m.weights / GB:>8.3f} {m.gradients / GB:>9.3f} "
        f"{(m.masters + m.moments) / GB:>9.3f} {m.averages / GB:>7.3f} {m.buckets / GB:>7.3f} "
        f"{m.activations / GB:>11.3f} {m.total / GB:>7.3f} {m.host / GB:>7.3f} {largest:>7}"
    ).rstrip()


def plan_json(
    config: RunConfig, num_processes: int, *, mfu: float, peak: float, limit: float | None, device: str
) -> dict[str, Any]:  # fmt: skip
    """The same for programs; bytes, FLOPs and seconds."""
    cost = count(config.model, config.diffusion)
    plan = Milestones.create(config, cost)
    disk = disk_of(config, plan, cost)
    micro, accumulation = split_batch(config, num_processes)
    compute = plan.total * cost.train_flops
    rows = choices(config, num_processes, limit=limit, device=device)
    return {
        "name": config.name, "num_params": cost.num_params, "train_flops_per_image": cost.train_flops,
        "images": plan.total, "steps": plan.total // config.train.global_batch, "flops": compute,
        "num_processes": num_processes, "micro_batch": micro, "accumulation": accumulation,
        "assumed": {"mfu": mfu, "peak_flops": peak, "device_memory": limit, "device": device},
        "device_seconds": compute / (peak * mfu), "exports": sorted(plan.exports),
        "disk": asdict(disk) | {"peak": disk.peak},
        "memory": [asdict(row) | {"total": row.memory.total} for row in rows],
    }  # fmt: skip


def _duration(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} seconds"


def _some(numbers: Sequence[int]) -> str:
    shown = [f"{n:,}" for n in numbers]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="a run's YAML file, such as those in configs/runs")
    parser.add_argument("--processes", type=int, default=1, help="one a device (default: 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what they run on (default: cuda)")
    parser.add_argument("--device-memory", type=float, metavar="GB", help="of one device, 1e9 bytes each, such as 80")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a device (default: 989e12, H100 bf16)")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak that is reached (default: 0.3)")
    parser.add_argument("--json", action="store_true", help="for programs: bytes, FLOPs, seconds")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces the file's value")
    return parser.parse_intermixed_args()


def main() -> int:
    """The command line."""
    args = _arguments()
    positive = {"--processes": args.processes, "--peak": args.peak, "--device-memory": args.device_memory}
    for option, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{option} {value:g} must be more than 0.")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g} must be a share from 0 to 1, such as 0.3.")
    config = load_config(args.config, args.overrides)
    memory = args.device_memory * GB * USABLE if args.device_memory else None
    assumed = {"mfu": args.mfu, "peak": args.peak, "limit": memory, "device": args.device}
    if args.json:
        print(json.dumps(plan_json(config, args.processes, **assumed), indent=1))
    else:
        print(plan_text(config, args.processes, **assumed))
    return 0


if __name__ == "__main__":
    run_cli(main)
