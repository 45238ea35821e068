"""What cannot fit is refused before anything starts: too few devices, too little memory, too small a disk."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.definition.shapes import eval_shape, trial_shapes
from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial
from cluster.planning.costs import trial_disk, trial_memory
from cluster.scheduling.jobs import Resources, Shape
from cluster.scheduling.pool import can_ever_fit
from cluster.words import count
from data_pipeline.errors import ConfigError, UserError
from data_pipeline.words import size
from trainer.memory import largest_that_fits, remedies
from trainer.micro_batch import USABLE

_KEPT = ("exports", "checkpoints", "ema_snapshots")  # the folders of a run that its disk space is reckoned for


def check_fits_devices(
    study: StudyConfig, trials: Sequence[Trial], nodes: Mapping[str, Resources], *, evaluates: bool | None = None
) -> None:
    """Raises ConfigError for what `nodes` can never hold, were they empty, and for too little memory of a device.

    `evaluates`: is there anything to evaluate? Default: as these trials say.
    """
    for trial in _one_a_rung(trials):
        shapes = trial_shapes(study, trial)
        if not any(can_ever_fit(shape, nodes) for shape in shapes):
            raise _no_room(f"trial {trial.name}", shapes[-1], nodes, *_TRIAL_REMEDY)
    if evaluates is None:
        evaluates = any(trial.evaluated for trial in trials)
    if evaluates and not can_ever_fit(eval_shape(study), nodes):
        raise _no_room("an evaluation", eval_shape(study), nodes, *_EVALUATION_REMEDY)
    check_fits_memory(study, trials)


def check_fits_memory(study: StudyConfig, trials: Sequence[Trial]) -> None:
    """Raises ConfigError for a trial that needs more than `device.memory_gb` of a device, on all of its processes or on
    the fewest with which it may go on.
    """
    if study.device.memory_gb is None:
        return
    wanted = study.resources
    a_process = wanted.gpus / wanted.num_processes or wanted.cpus / wanted.num_processes  # devices
    limit = USABLE * 1e9 * study.device.memory_gb * a_process
    for trial in _one_a_rung(trials):
        for shape in trial_shapes(study, trial):
            need = trial_memory(study, trial, shape.num_processes).total
            if need > limit:
                raise ConfigError(_no_memory(study, trial, shape.num_processes, need, limit))


def check_fits_storage(study: StudyConfig, trials: Sequence[Trial], path: Path) -> None:
    """Raises UserError where the disk of the study's folder `path` cannot hold what is still to be written.

    What finished trials left, and what unfinished ones have written so far, is there already. Samples, metrics and
    logs are not counted.
    """
    missing = [trial for trial in trials if not _is_done(path / "trials" / trial.name, trial)]
    disks = {trial.name: trial_disk(trial) for trial in missing}
    writing = max((disk.checkpoint for disk in disks.values()), default=0.0)  # one, at least, beside those kept
    there = sum(_size_of(path / "trials" / trial.name) for trial in missing)
    need = max(0.0, sum(disk.peak - disk.checkpoint for disk in disks.values()) + writing - there)
    free = shutil.disk_usage(_existing(path)).free
    if need > free:
        raise UserError(
            f"study {study.name} still needs {size(need)} in {path} (exports for evaluation, and checkpoints), but "
            f"{size(free)} are free there; give a folder on a larger disk with --out, or keep less: fewer "
            "checkpoints (settings: train.keep_checkpoints, train.keep_every_images), points (evaluation.num_points) "
            "or seeds."
        )


def nodes_in_words(nodes: Mapping[str, Resources]) -> str:
    """`4 nodes with 96 CPUs and 8 GPUs`."""
    kinds = Counter(str(has) for has in nodes.values())
    return ", and ".join(f"{count(num, 'node')} with {kind}" for kind, num in kinds.items()) or "no nodes"


_TRIAL_REMEDY = (
    "resources.num_processes, .num_nodes, .cpus and .gpus",
    "ask for less, or let trials go on with fewer processes (resources.min_processes)",
)
_EVALUATION_REMEDY = ("resources.eval_cpus and .eval_gpus", "ask for less")


def _no_room(who: str, shape: Shape, nodes: Mapping[str, Resources], keys: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"{who} needs {shape} ({keys}), but the cluster has {nodes_in_words(nodes)}; {remedy}, or give more or larger "
        "nodes (cluster.nodes, .cpus and .gpus)."
    )


def _no_memory(study: StudyConfig, trial: Trial, num_processes: int, need: float, limit: float) -> str:
    device = "cuda" if study.resources.gpus else "cpu"
    micro = largest_that_fits(trial.config, num_processes, limit, device=device)
    fewer = num_processes < study.resources.num_processes
    ways = [f"raise resources.min_processes={study.resources.min_processes}"] if fewer else []
    ways.append(
        f"set train.micro_batch={micro} in `settings`, which accumulates to the same train.global_batch"
        if micro is not None
        else remedies(trial.config, num_processes)
    )
    return (
        f"trial {trial.name} needs {size(need)} of memory in each of its processes"
        + (f" when it goes on with {num_processes}" if fewer else "")
        + f", but {size(limit)} can be used ({100 * USABLE:.0f} % of device.memory_gb={study.device.memory_gb:g} a "
        f"{study.device.name}); {', or '.join(ways)}."
    )


def _one_a_rung(trials: Iterable[Trial]) -> Iterable[Trial]:
    return {trial.rung: trial for trial in trials}.values()


def _is_done(folder: Path, trial: Trial) -> bool:
    try:
        return bool(json.loads((folder / "result.json").read_text())["nimg"] >= trial.total_images)
    except (OSError, ValueError, KeyError):
        return False


def _size_of(folder: Path) -> int:
    """Bytes of the files that a trial's disk space is reckoned for."""
    total = 0
    for name in _KEPT:
        for file in (folder / name).rglob("*"):
            try:
                total += file.stat().st_size if file.is_file() else 0
            except OSError:
                continue  # just removed
    return total


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
