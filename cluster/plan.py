"""What a study will cost, before anything starts: a table of trials and the totals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.jobs import EvalJob, Resources, TrialJob
from cluster.shapes import eval_shape, trial_shapes
from cluster.simulate import SimulatedTrial, simulated_eval, simulated_schedule
from cluster.spec import StudyConfig
from cluster.trials import Trial
from trainer.diffusion.guidance import num_calls_a_step
from trainer.diffusion.respacing import space_timesteps
from trainer.memory import Memory, memory_of

_HEADER = ("trial", "parameters", "FLOP/image", "images", "FLOP", "points", "evaluation", "time", "memory", "disk")


def trial_seconds(study: StudyConfig, trial: Trial) -> float:
    """Training time of a trial on its own devices, at the study's assumed rate."""
    return trial.compute / (_rate(study) * devices_a_trial(study))


def evaluation_flops(study: StudyConfig, trial: Trial, *, last: bool) -> float:
    """FLOPs of all evaluations at one point of a trial; `last`: at its last one."""
    if not trial.evaluated:
        return 0.0
    nll, distance, calls = study.evaluation.nll, study.evaluation.distance, 0
    if nll is not None:
        by_split = {"test": nll.num_calls, "train": nll.train_num_calls or nll.num_calls}
        calls += sum(by_split[split] for split in nll.splits)
    if distance is not None and (last or distance.points == "all"):
        num_steps = len(space_timesteps(trial.config.diffusion.num_timesteps, distance.respacing))
        calls += distance.repeats * distance.num_samples * num_steps * num_calls_a_step(distance.guidance)
    return calls * trial.cost.forward_flops


def devices_a_trial(study: StudyConfig) -> float:
    return study.resources.gpus or study.resources.cpus


def trial_memory(study: StudyConfig, trial: Trial) -> Memory:
    """What each process of a trial needs: on its GPU, or of the host's memory where it has none."""
    return memory_of(trial.config, study.resources.num_processes, device="cuda" if study.resources.gpus else "cpu")


def plan_text(study: StudyConfig, trials: Sequence[Trial], *, cluster: Resources | None = None) -> str:
    """The table, the totals, and the time on `cluster` (default: the devices that the study file counts)."""
    device, used = study.device, devices_a_trial(study)
    rows = [_row(study, trial) for trial in trials]
    total = sum(trial.compute for trial in trials)
    evaluation = sum(_evaluations(study, trial) for trial in trials)
    seconds = sum(trial_seconds(study, trial) for trial in trials) * used
    devices = device.count or used
    slots = cluster or (
        Resources(cpus=1e9, gpus=devices) if study.resources.gpus else Resources(cpus=max(devices, used), gpus=0)
    )
    wall = makespan(study, trials, slots)
    per_device = f"{100 * device.utilization:g} % of {device.peak_flops / 1e12:,.4g} TFLOP/s"
    return "\n".join(
        [
            f"study {study.name}: {len(trials)} trials, {sum(len(t.export_images) for t in trials)} evaluated points",
            "",
            format_table(_HEADER, rows),
            "",
            f"training:    {flops(total)} FLOP in all (2 per multiply-add, training = 3 x forward)",
            f"             {seconds / 3600:,.3g} {device.name}-hours at {per_device}",
            f"evaluation:  {flops(evaluation)} FLOP ({evaluation / total:.1%} of training)",
            "memory:      the most that each process needs of its device; `python -m trainer.plan` says of what kinds",
            f"disk:        {size(sum(trial.disk_bytes for trial in trials))}",
            f"wall time:   about {duration(wall)} on {devices:g} x {device.name} ({used:g} a trial), longest first",
        ]
    )


def makespan(study: StudyConfig, trials: Sequence[Trial], slots: Resources) -> float:
    """Seconds on `slots`, training and evaluation, by the real scheduler on a simulated clock."""
    by_name = {trial.name: trial for trial in trials}
    shape = eval_shape(study)
    simulated = [
        SimulatedTrial(
            TrialJob(
                trial.name, Path(trial.name), trial_shapes(study, trial), trial_seconds(study, trial), trial.priority
            ),
            tuple((nimg / trial.total_images, nimg) for nimg in trial.export_images),
        )
        for trial in trials
    ]

    def evaluations(name: str, nimg: int) -> list[EvalJob]:
        work = evaluation_flops(study, by_name[name], last=nimg == by_name[name].total_images)
        seconds = work / (_rate(study) * shape.total.devices)
        return [simulated_eval(name, nimg, shape=shape, seconds=seconds)] if work else []

    share = study.resources.eval_share
    return simulated_schedule(simulated, {"node": slots}, evaluations, eval_share=share).makespan


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def duration(seconds: float) -> str:
    """`3:05`, `2:10:00` or `4.2 days`."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes.removeprefix("0")


def flops(value: float) -> str:
    """`1.858e20`."""
    return f"{value:.3e}".replace("e+", "e")


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def _rate(study: StudyConfig) -> float:
    return study.device.peak_flops * study.device.utilization


def _evaluations(study: StudyConfig, trial: Trial) -> float:
    last = trial.export_images[-1]
    return sum(evaluation_flops(study, trial, last=n == last) for n in trial.export_images)


def _row(study: StudyConfig, trial: Trial) -> tuple[str, ...]:
    return (
        trial.name,
        f"{trial.cost.num_params:,}",
        flops(trial.cost.train_flops),
        f"{trial.total_images:,}",
        flops(trial.compute),
        str(len(trial.export_images)),
        flops(_evaluations(study, trial)),
        duration(trial_seconds(study, trial)),
        size(trial_memory(study, trial).total),
        size(trial.disk_bytes),
    )
