"""From a study file to its trials: each with a full run config, the points where it is evaluated, and its cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.spec import Budget, ExtraTrial, StudyConfig, nest
from data_pipeline.errors import ConfigError
from trainer.config import RunConfig, merge, read_tree, validate
from trainer.models import ModelCost, count

_BYTES = 4  # everything is stored in float32
# From small to large: light to dark, as in the figures; readable on white and by the colour-blind.
_COLOURS = ("#86d549", "#35b779", "#20938c", "#2e6e8e", "#404588", "#471365")
EXTRA_COLOUR = "#8c8c8c"


@dataclass(frozen=True)
class Trial:
    """One training run of a study."""

    name: str  # of its folder
    label: str  # its size, for tables and charts
    seed: int
    fitted: bool  # is its curve part of the law?
    evaluated: bool
    config: RunConfig
    cost: ModelCost
    total_images: int
    export_images: tuple[int, ...]  # ascending; the last is total_images

    @property
    def compute(self) -> float:
        """Training FLOPs to its end."""
        return self.total_images * self.cost.train_flops

    @property
    def disk_bytes(self) -> float:
        """Exports (weights and their average) and the checkpoints kept (and one being written), with two moments."""
        exports = 2 * len(self.export_images)
        return self.cost.num_params * _BYTES * (exports + 4.0 * (self.config.train.keep_checkpoints + 1))


def make_trials(study: StudyConfig) -> list[Trial]:
    """All trials, by rung and seed; the extra ones last.

    Raises ConfigError naming the trial and what is wrong with its config.
    """
    trials = [_ladder_trial(study, value, seed) for value in study.ladder.values for seed in study.seeds]
    trials += [_extra_trial(study, extra, seed) for extra in study.extra for seed in study.seeds]
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two trials are called {name!r}; give the extra trial another name.")
    return trials


def trial_config(trial: Trial, folder: Path) -> RunConfig:
    """The config that the trial's processes run, in its folder."""
    return trial.config.model_copy(update={"run": trial.config.run.model_copy(update={"folder": folder})})


def log_spaced(first: int, last: int, num: int, *, multiple: int) -> tuple[int, ...]:
    """At most `num` multiples from `first` to `last`, evenly spaced in the logarithm; `last` is one of them."""
    points = np.geomspace(min(first, last), last, num)
    rounded = {min(last, max(multiple, round(point / multiple) * multiple)) for point in points}
    return tuple(sorted(rounded | {last}))


def _ladder_trial(study: StudyConfig, value: int | float, seed: int) -> Trial:
    ladder = study.ladder
    short = ladder.key.rpartition(".")[2]
    settings = {ladder.key: value}
    settings |= {key: rule.value * (value / rule.at) ** rule.power for key, rule in ladder.rules.items()}
    position = sorted(ladder.values).index(value) / max(1, len(ladder.values) - 1)
    return _make(
        study, study.run, study.settings | settings, study.budget, seed,
        name=_slug(f"{short}{value}-seed{seed}"), label=ladder.label.format(key=short, value=value), fitted=True,
        evaluated=True, colour=_COLOURS[round(position * (len(_COLOURS) - 1))],
    )  # fmt: skip


def _extra_trial(study: StudyConfig, extra: ExtraTrial, seed: int) -> Trial:
    budget = Budget(images=extra.budget_images) if extra.budget_images else study.budget
    return _make(
        study, extra.run, extra.settings, budget, seed,
        name=f"{extra.name}-seed{seed}", label=extra.name, fitted=False, evaluated=extra.evaluate, colour=EXTRA_COLOUR,
    )  # fmt: skip


def _make(
    study: StudyConfig, file: Path, settings: dict[str, Any], budget: Budget, seed: int, *,
    name: str, label: str, fitted: bool, evaluated: bool, colour: str,
) -> Trial:  # fmt: skip
    source = f"study {study.name!r}, trial {name}"
    threads = None if study.resources.gpus else max(1, int(study.resources.cpus) // study.resources.num_processes)
    tags = {"study": study.name, "size": label, "fitted": "yes" if fitted else "no", "mlflow.runColor": colour}
    forced = {
        "name": label if len(study.seeds) == 1 else f"{label} seed {seed}",
        "seed": seed,
        "engine": {"num_cpu_threads": threads},
        "tracking": {"mlflow": False, "tags": tags},  # the study's own child sends all trials
    }
    tree = merge(merge(read_tree(file), nest(settings)), forced)
    tree.setdefault("train", {}).update(budget_images=1, budget_flops=None, export_images=[])
    draft = validate(RunConfig, tree, source=source)
    if draft.train.global_batch % study.resources.num_processes:
        raise ConfigError(
            f"{source}: train.global_batch={draft.train.global_batch} cannot be shared by "
            f"resources.num_processes={study.resources.num_processes}; choose a divisor."
        )
    cost = count(draft.model, draft.diffusion)
    batch = draft.train.global_batch
    total = _step_end(budget.images or (budget.flops or 0.0) / cost.train_flops, batch)
    points = _points(study, total, batch)
    tree["train"] = merge(tree["train"], {"budget_images": total, "export_images": list(points)})
    config = validate(RunConfig, tree, source=source)
    return Trial(name, label, seed, fitted, evaluated, config, cost, total, points)


def _points(study: StudyConfig, total: int, batch: int) -> tuple[int, ...]:
    wanted = study.evaluation
    if wanted.images is None:
        return log_spaced(wanted.min_images, total, wanted.num_points, multiple=batch)
    return tuple(sorted({_step_end(n, batch) for n in wanted.images if n < total} | {total}))


def _step_end(images: float, batch: int) -> int:
    """Moved up to the end of its step, as the trainer does."""
    return max(1, -(-int(images) // batch)) * batch


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def data_folders(study: StudyConfig, trials: list[Trial]) -> Iterator[str]:
    """Every split the study reads, once."""
    yield from dict.fromkeys([study.evaluation.test, *(trial.config.data.train for trial in trials)])
