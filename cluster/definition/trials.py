"""From a study file to its trials: each with a full run config, the points where it is evaluated, and its cost."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.definition.spec import Budget, ExtraTrial, StudyConfig, nest
from data_pipeline.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.config.tree import merge, read_tree, validate
from trainer.models import ModelCost, count

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
    colour: str  # of its curve
    priority: int = 0  # higher first

    @property
    def compute(self) -> float:
        """Training FLOPs to its end."""
        return self.total_images * self.cost.train_flops

    @property
    def rung(self) -> str:
        """Its name without the seed: trials that have it in common differ in their seed only."""
        return self.name.rpartition("-seed")[0]


def make_trials(study: StudyConfig) -> list[Trial]:
    """All trials, by rung and seed; the extra ones last.

    Raises ConfigError naming the trial and what is wrong with its config.
    """
    trials = [trial for number in range(len(study.ladder.values)) for trial in _ladder_trials(study, number)]
    trials += [trial for extra in study.extra for trial in _extra_trials(study, extra)]
    names = [trial.name for trial in trials]
    for name, times in Counter(names).items():
        if times > 1:
            raise ConfigError(f"two trials are called {name!r}; give the extra trial another name.")
    ranks = _priorities(study, names)
    return [replace(trial, priority=ranks[trial.name]) for trial in trials]


def trial_config(trial: Trial, folder: Path) -> RunConfig:
    """The config that the trial's processes run, in its folder."""
    # The study has one mirror of all its runs.
    run = trial.config.run.model_copy(update={"folder": folder, "mirror": None})
    return trial.config.model_copy(update={"run": run})


def log_spaced(first: int, last: int, num: int, *, multiple: int) -> tuple[int, ...]:
    """At most `num` multiples from `first` to `last`, evenly spaced in the logarithm; `last` is one of them."""
    points = np.geomspace(min(first, last), last, num)
    rounded = {min(last, max(multiple, round(point / multiple) * multiple)) for point in points}
    return tuple(sorted(rounded | {last}))


def _ladder_trials(study: StudyConfig, number: int) -> list[Trial]:
    ladder = study.ladder
    return _with_seeds(
        study, study.run, study.settings | ladder.settings(number), study.budget, name=ladder.rung_name(number),
        label=ladder.size_label(number), fitted=True, evaluated=True, colour=ladder.colour(number),
    )  # fmt: skip


def _extra_trials(study: StudyConfig, extra: ExtraTrial) -> list[Trial]:
    budget = Budget(images=extra.budget_images) if extra.budget_images else study.budget
    return _with_seeds(
        study, extra.run, extra.settings, budget, name=extra.name, label=extra.name, fitted=False,
        evaluated=extra.evaluate, colour=EXTRA_COLOUR,
    )  # fmt: skip


def _with_seeds(
    study: StudyConfig, file: Path, settings: dict[str, Any], budget: Budget, *,
    name: str, label: str, fitted: bool, evaluated: bool, colour: str,
) -> list[Trial]:  # fmt: skip
    """One size with every seed: the network is counted once."""
    source = f"study {study.name!r}, trial {name}"
    threads = None if study.resources.gpus else max(1, int(study.resources.cpus) // study.resources.num_processes)
    tags = {"study": study.name, "size": label, "fitted": "yes" if fitted else "no", "mlflow.runColor": colour}
    forced = {
        "name": label,
        "seed": study.seeds[0],
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
    if evaluated and study.evaluation.weights not in (there := (*draft.train.averages, "model")):
        raise ConfigError(
            f"{source}: evaluation.weights={study.evaluation.weights} is none of its {', '.join(there)}; name one of "
            "them, or track it: settings: train.ema_profiles or train.extra_ema_decays."
        )
    if evaluated and draft.is_classifier and (study.evaluation.nll or study.evaluation.distance):
        raise ConfigError(
            f"{source}: model.name=classifier has no likelihood and makes no samples that a study could evaluate; "
            "train it beside the ladder (extra, with evaluate: false), or set evaluation.nll=null and no "
            "evaluation.distance."
        )
    if fitted and study.evaluation.flops and draft.train.lr_decay != "none":
        raise ConfigError(
            f"{source}: train.lr_decay={draft.train.lr_decay} with evaluation.flops, which takes a run on its way for "
            "a shorter one that has ended there; set train.lr_decay=none, or leave evaluation.flops out."
        )
    cost = count(draft.model, draft.diffusion)
    batch = draft.train.global_batch
    total = _step_end(budget.images or (budget.flops or 0.0) / cost.train_flops, batch)
    points = _points(study, cost.train_flops, total, batch, source=source if fitted else None)
    tree["train"] |= {"budget_images": total, "export_images": list(points), "micro_batch": _micro_batch(study, draft)}
    trials = []
    for seed in study.seeds:
        of_seed = {"name": label if len(study.seeds) == 1 else f"{label} seed {seed}", "seed": seed}
        config = validate(RunConfig, tree | of_seed, source=f"{source}-seed{seed}")
        facts = (fitted, evaluated, config, cost, total, points, colour)
        trials.append(Trial(f"{name}-seed{seed}", label, seed, *facts))
    return trials


def _micro_batch(study: StudyConfig, config: RunConfig) -> int | None:
    """Where fewer processes may go on, none of them takes more images at once, and so more memory, than all do."""
    share = config.train.global_batch // study.resources.num_processes
    return config.train.micro_batch if study.resources.min_processes is None else min(
        config.train.micro_batch or share, share)  # fmt: skip


def _points(
    study: StudyConfig, flops_an_image: float, total: int, batch: int, *, source: str | None
) -> tuple[int, ...]:
    """Images seen at which a trial is evaluated. `source` names one that must reach every point of equal compute."""
    wanted = study.evaluation
    if wanted.images is None and wanted.flops is None:
        return log_spaced(wanted.min_images, total, wanted.num_points, multiple=batch)
    points = {_step_end(images, batch) for images in wanted.images or () if images < total}
    for flops in wanted.flops or ():
        point = _step_end(flops / flops_an_image, batch)
        if point > total and source is not None:
            raise ConfigError(
                f"{source}: evaluation.flops={flops:g} lies beyond its budget, which it reaches after {total:,} images "
                f"and {total * flops_an_image:.4g} FLOPs; raise the budget (budget.flops is the same for all sizes) or "
                "leave that point out."
            )
        points |= {point} if point <= total else set()
    return tuple(sorted(points | {total}))


def _step_end(images: float, batch: int) -> int:
    """Moved up to the end of its step, as the trainer does."""
    return max(1, -(-int(images) // batch)) * batch


def _priorities(study: StudyConfig, names: Sequence[str]) -> dict[str, int]:
    """Each trial's priority. Raises ConfigError for a pattern that is nobody's name."""
    for pattern in study.priorities:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ConfigError(f"priorities.{pattern}: no trial is called so; the study's trials are {shown}.")
    return {
        name: next((p for glob, p in reversed(study.priorities.items()) if fnmatch.fnmatchcase(name, glob)), 0)
        for name in names
    }


def data_folders(study: StudyConfig, trials: list[Trial]) -> Iterator[str]:
    """Every split the study reads, once."""
    yield from dict.fromkeys([study.evaluation.test, *(trial.config.data.train for trial in trials)])
