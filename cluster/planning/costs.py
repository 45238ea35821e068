"""What the trials of a study and their evaluations cost: FLOPs, seconds, memory, disk. Reckoned, nothing is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.definition.shapes import eval_shape, trial_shapes
from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial
from trainer.memory import Memory, memory_of
from trainer.milestones import Milestones
from trainer.plan import Disk, disk_of
from trainer.sampling import sample_flops


@dataclass(frozen=True)
class TrialCost:
    """What one trial takes."""

    evaluation_flops: float  # of all its points
    seconds: float  # of training, on the devices that it asks for
    device_seconds: float
    evaluation_device_seconds: float
    memory: float  # bytes of each process
    disk: Disk


def trial_costs(study: StudyConfig, trials: Iterable[Trial]) -> dict[str, TrialCost]:
    """The costs of each trial by its name; those that differ in their seed cost the same."""
    by_rung: dict[str, TrialCost] = {}
    found = {}
    for trial in trials:
        if trial.rung not in by_rung:
            by_rung[trial.rung] = _cost(study, trial)
        found[trial.name] = by_rung[trial.rung]
    return found


def rate(study: StudyConfig) -> float:
    """FLOP/s that one device is assumed to reach."""
    return study.device.peak_flops * study.device.utilization


def trial_seconds(study: StudyConfig, trial: Trial) -> float:
    """Training time of a trial on the devices that it asks for."""
    return trial.compute / (rate(study) * trial_shapes(study, trial)[0].total.devices)


def evaluation_flops(study: StudyConfig, trial: Trial, *, last: bool) -> list[float]:
    """FLOPs of each evaluation at one point of a trial, in the order of `folder.requests`; `last`: at its last one."""
    if not trial.evaluated:
        return []
    nll, distance = study.evaluation.nll, study.evaluation.distance
    flops = []
    if nll is not None:
        by_split = {"test": nll.num_calls, "train": nll.train_num_calls or nll.num_calls}
        flops += [by_split[split] * trial.cost.forward_flops for split in nll.splits]
    if distance is not None and (last or distance.points == "all"):
        flops.append(distance.repeats * distance.num_samples * sample_flops(trial.config, distance.sampling))
    return flops


def evaluation_seconds(study: StudyConfig, trial: Trial, *, last: bool) -> list[float]:
    """Time of each evaluation at one point of a trial, shared by all of its shards."""
    devices = eval_shape(study).total.devices * study.resources.eval_shards
    return [work / (rate(study) * devices) for work in evaluation_flops(study, trial, last=last)]


def trial_memory(study: StudyConfig, trial: Trial, num_processes: int | None = None) -> Memory:
    """What each process of a trial needs: on its GPU, or of the host's memory where it has none.

    Raises ConfigError for a batch that the processes cannot share.
    """
    device = "cuda" if study.resources.gpus else "cpu"
    return memory_of(trial.config, num_processes or study.resources.num_processes, device=device)


def trial_disk(trial: Trial) -> Disk:
    """What a trial's exports and checkpoints take."""
    return disk_of(trial.config, Milestones.create(trial.config, trial.cost), trial.cost)


def _cost(study: StudyConfig, trial: Trial) -> TrialCost:
    seconds = trial_seconds(study, trial)
    work = sum(sum(evaluation_flops(study, trial, last=n == trial.total_images)) for n in trial.export_images)
    return TrialCost(
        evaluation_flops=work, seconds=seconds, memory=trial_memory(study, trial).total, disk=trial_disk(trial),
        device_seconds=seconds * trial_shapes(study, trial)[0].total.devices,
        evaluation_device_seconds=work / rate(study),
    )  # fmt: skip
