"""What a job of a study takes, as shapes: so many nodes, the same on each."""

from __future__ import annotations

from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial
from cluster.scheduling.jobs import Resources, Shape


def trial_shapes(study: StudyConfig, trial: Trial) -> tuple[Shape, ...]:
    """How a trial may run: as the study asks first, then on fewer and fewer processes, down to `min_processes`.

    Each process keeps its CPUs and its GPU, and a node never has more processes than it was asked for. Numbers of
    processes divide the one asked for, so they share the batch in whole micro-batches.
    """
    wanted = study.resources
    fewest = wanted.min_processes or wanted.num_processes
    return tuple(
        _shape(study, n) for n in range(wanted.num_processes, fewest - 1, -1)
        if wanted.num_processes % n == 0 and trial.config.train.global_batch % n == 0
    )  # fmt: skip


def eval_shape(study: StudyConfig) -> Shape:
    """What one process of an evaluation takes."""
    return Shape(Resources(study.resources.eval_cpus, study.resources.eval_gpus))


def _shape(study: StudyConfig, num_processes: int) -> Shape:
    wanted = study.resources
    most = wanted.num_processes // wanted.num_nodes  # on a node
    enough = range(-(-num_processes // most), num_processes + 1)
    nodes = next(n for n in enough if num_processes % n == 0)
    per_process = Resources(wanted.cpus, wanted.gpus) * (1 / wanted.num_processes)
    return Shape(_exact(per_process * (num_processes / nodes)), nodes, num_processes)


def _exact(resources: Resources) -> Resources:
    """Whole numbers where they are meant: 8 GPUs by way of thirds are 8."""
    return Resources(round(resources.cpus, 6), round(resources.gpus, 6))
