"""What a study will cost and how it will run on a cluster, before anything starts.

The schedule is that of the real scheduler on a simulated clock, were every time as reckoned: without start-ups,
failures, or the time that files take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.definition.shapes import eval_shape, trial_shapes
from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial
from cluster.planning.costs import TrialCost, evaluation_seconds, trial_costs
from cluster.planning.fits import check_fits_devices, nodes_in_words
from cluster.planning.gantt import devices, text_chart
from cluster.scheduling.jobs import EvalJob, Resources, TrialJob
from cluster.scheduling.simulate import Schedule, SimulatedTrial, simulated_schedule
from cluster.words import count, duration, flops, format_table
from data_pipeline.words import size

_HEADER = ("trial", "parameters", "FLOP/image", "images", "FLOP", "points", "evaluation", "time", "memory", "disk")
_MOST_ROWS = 24  # of trials; more are shown as sizes


@dataclass(frozen=True)
class PlanReport:
    """A study's costs, and its schedule on a cluster."""

    study: StudyConfig
    trials: tuple[Trial, ...]
    costs: Mapping[str, TrialCost]  # by trial
    nodes: Mapping[str, Resources]
    schedule: Schedule

    @property
    def utilization(self) -> float:
        """The share of the devices' time, up to the makespan, in which they are held."""
        held = sum(devices(span.resources) * (span.end - span.start) for span in self.schedule.spans)
        there = sum(devices(has) for has in self._devices().values()) * self.schedule.makespan
        return held / there if there else 0.0

    @property
    def over_bound(self) -> float:
        """Makespan over the time below which no schedule can go."""
        return self.schedule.makespan / self.schedule.bound if self.schedule.bound else 1.0

    def text(self) -> str:
        """All of it for the terminal; the chart only for few nodes."""
        points = count(sum(len(trial.export_images) for trial in self.trials), "evaluated point")
        head = f"study {self.study.name}: {count(len(self.trials), 'trial')}, {points}"
        names = {trial.name: trial.rung if self._are_many else trial.name for trial in self.trials}
        chart = text_chart(self.schedule, self._devices(), names)
        parts = [head, self._table(), "\n".join([*self._cost_lines(), *self._schedule_lines()]), chart]
        return "\n\n".join(part for part in parts if part)

    def figure(self, path: Path) -> None:
        """Write a picture of the schedule; the suffix of `path` says of what kind (.png, .svg, .pdf)."""
        from cluster.planning.schedule_figure import Look, draw_schedule
        from evaluation.report.figures import save_figure

        seeds = len(self.study.seeds) > 1
        looks = {t.name: Look(t.label, f"{t.label} seed {t.seed}" if seeds else t.label, t.colour) for t in self.trials}
        title = f"{self.study.name}: {self._schedule_words()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(draw_schedule(self.schedule, self._devices(), looks, title=title), path)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; times in seconds, sizes in bytes."""
        schedule = asdict(self.schedule)
        return {
            "study": self.study.name,
            "device": self.study.device.model_dump(mode="json"),
            "trials": [self._trial_json(trial) for trial in self.trials],
            "totals": self._totals(),
            "nodes": {node: asdict(has) for node, has in self.nodes.items()},
            "schedule": schedule | {"over_bound": self.over_bound, "utilization": self.utilization},
        }

    def _trial_json(self, trial: Trial) -> dict[str, Any]:
        facts = ("name", "label", "seed", "priority", "fitted", "export_images")
        cost = self.costs[trial.name]
        return {
            **{fact: getattr(trial, fact) for fact in facts},
            "num_params": trial.cost.num_params, "flops_per_image": trial.cost.train_flops,
            "images": trial.total_images, "flops": trial.compute, **asdict(cost), "disk": cost.disk.peak,
            "shapes": [asdict(shape) for shape in trial_shapes(self.study, trial)],
        }  # fmt: skip

    def _totals(self) -> dict[str, float]:
        costs = [self.costs[trial.name] for trial in self.trials]
        return {
            "flops": sum(trial.compute for trial in self.trials),
            "evaluation_flops": sum(cost.evaluation_flops for cost in costs),
            "device_hours": sum(cost.device_seconds for cost in costs) / 3600,
            "evaluation_device_hours": sum(cost.evaluation_device_seconds for cost in costs) / 3600,
            "memory": max(cost.memory for cost in costs),
            "disk": sum(cost.disk.peak for cost in costs),
        }

    def _devices(self) -> Mapping[str, Resources]:
        """The nodes as the schedule counts them: by their CPUs where the study needs no GPU."""
        wanted = self.study.resources
        needs_gpus = wanted.gpus or wanted.eval_gpus
        return self.nodes if needs_gpus else {node: Resources(has.cpus) for node, has in self.nodes.items()}

    @property
    def _are_many(self) -> bool:
        return len(self.trials) > _MOST_ROWS

    def _table(self) -> str:
        """A line a trial, or where those are many a line a size."""
        if not self._are_many:
            return format_table(_HEADER, [self._row(trial.name, trial) for trial in self.trials])
        sizes: dict[str, list[Trial]] = {}
        for trial in self.trials:
            sizes.setdefault(trial.rung, []).append(trial)
        rows = [self._row(f"{rung} x {len(group)}", group[0]) for rung, group in sizes.items()]
        return format_table(("of each trial", *_HEADER[1:]), rows)

    def _row(self, name: str, trial: Trial) -> tuple[str, ...]:
        cost = self.costs[trial.name]
        return (
            name, f"{trial.cost.num_params:,}", flops(trial.cost.train_flops), f"{trial.total_images:,}",
            flops(trial.compute), str(len(trial.export_images)), flops(cost.evaluation_flops), duration(cost.seconds),
            size(cost.memory), size(cost.disk.peak),
        )  # fmt: skip

    def _cost_lines(self) -> list[str]:
        device, total = self.study.device, self._totals()
        rate = f"{100 * device.utilization:g} % of {device.peak_flops / 1e12:,.4g} TFLOP/s"
        share = total["evaluation_flops"] / total["flops"]
        limit = f" of its {device.memory_gb:g} GB" if device.memory_gb else ""
        return [
            f"training:    {flops(total['flops'])} FLOP in all (2 per multiply-add, training = 3 x forward)",
            f"             {total['device_hours']:,.3g} {device.name}-hours at {rate}",
            f"evaluation:  {flops(total['evaluation_flops'])} FLOP ({100 * share:.1f} % of training), "
            f"{total['evaluation_device_hours']:,.3g} {device.name}-hours",
            f"memory:      at most {size(total['memory'])}{limit} a process of a trial; of what kinds says "
            "`python -m trainer.plan`",
            f"disk:        at most {size(total['disk'])} of exports and checkpoints",
        ]

    def _schedule_lines(self) -> list[str]:
        shape = trial_shapes(self.study, self.trials[0])[0]
        processes = count(shape.num_processes, "process", "processes")
        return [
            f"cluster:     {nodes_in_words(self.nodes)}; {processes} a trial, on {shape}",
            f"schedule:    {self._schedule_words()}",
        ]

    def _schedule_words(self) -> str:
        held = f"{100 * self.utilization:.0f} % of the devices' time is used"
        if self.over_bound < 1.0005:
            return f"{duration(self.schedule.makespan)}, and no schedule can end earlier; {held}"
        bound = duration(self.schedule.bound)
        return (
            f"{duration(self.schedule.makespan)}, {self.over_bound:.3f} x the {bound} that no schedule can beat; {held}"
        )


def plan_report(
    study: StudyConfig, trials: Sequence[Trial], nodes: Mapping[str, Resources] | None = None
) -> PlanReport:  # fmt: skip
    """The plan on `nodes`; default: on those that the study file tells of (`planned_nodes`).

    Raises ConfigError for what can never fit.
    """
    nodes = nodes or planned_nodes(study)
    check_fits_devices(study, trials, nodes)
    costs = trial_costs(study, trials)
    return PlanReport(study, tuple(trials), costs, nodes, _schedule(study, trials, costs, nodes))


def planned_nodes(study: StudyConfig) -> dict[str, Resources]:
    """The nodes of the study's `cluster:`, else one with `device.count` devices, else those of one trial."""
    if study.cluster is not None:
        has = Resources(study.cluster.cpus, study.cluster.gpus)
        return {f"node{i}": has for i in range(study.cluster.nodes)}
    wanted, num = study.resources, study.device.count
    if num is None:
        cpus, gpus = max(wanted.cpus / wanted.num_nodes, wanted.eval_cpus), max(
            wanted.gpus / wanted.num_nodes, wanted.eval_gpus)  # fmt: skip
        return {f"node{i}": Resources(cpus, gpus) for i in range(wanted.num_nodes)}
    if not wanted.gpus:
        return {"node0": Resources(max(num, wanted.cpus))}
    return {"node0": Resources(num * max(wanted.cpus / wanted.gpus, wanted.eval_cpus / max(1, wanted.eval_gpus)), num)}


def _schedule(
    study: StudyConfig, trials: Sequence[Trial], costs: Mapping[str, TrialCost], nodes: Mapping[str, Resources]
) -> Schedule:  # fmt: skip
    by_name = {trial.name: trial for trial in trials}
    evaluations = lru_cache(maxsize=None)(
        lambda name, nimg: _evaluations(study, by_name[name], nimg)
    )  # asked for often
    simulated = [
        SimulatedTrial(
            TrialJob(t.name, Path(t.name), trial_shapes(study, t), costs[t.name].seconds, t.priority),
            tuple((nimg / t.total_images, nimg) for nimg in t.export_images),
        )
        for t in trials
    ]
    return simulated_schedule(simulated, nodes, evaluations, eval_share=study.resources.eval_share)


def _evaluations(study: StudyConfig, trial: Trial, nimg: int) -> list[EvalJob]:
    """The processes of all evaluations of an export, which only take time."""
    shape, num_shards, nowhere = eval_shape(study), study.resources.eval_shards, Path("/nonexistent")
    return [
        EvalJob(
            f"{trial.name}/{nimg}/{i}.{shard}", trial.name, nimg, nowhere, nowhere, None, (shard, num_shards), (shape,),
            seconds, trial.priority,
        )
        for i, seconds in enumerate(evaluation_seconds(study, trial, last=nimg == trial.total_images))
        for shard in range(num_shards)
    ]  # fmt: skip
