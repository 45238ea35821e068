"""One study from its start to its table, undisturbed or struck by one fault after the other, and what became of it."""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fault_kinds import FAULTS, Fault, Hit, training
from benchmarks.fault_stage import Stage, wait_for
from benchmarks.fault_tables import Comparison, compare
from benchmarks.fault_watch import Marks, StudyWatch, new_or_changed, started_again

_PATIENCE = 600.0  # seconds in which the study must move on, or end
_FIRST, _LAST = 0.06, 0.8  # of the training, between which faults are spread
_MAX_RESTARTS = 5
# Faults of which the journal must say what was tried again and why; the others leave no job to be tried again.
TOLD = ("trainer", "node", "long node", "evaluator", "worker", "disk")

# Faults that end all trials: devices are given anew then, and one of these trials may wait behind others.
EVERYTHING = ("driver", "head")


@dataclass(frozen=True)
class Planned:
    """A fault and when it comes."""

    fault: Fault
    at: float  # progress of the training, 0 to 1
    away: float  # seconds until it is mended


@dataclass
class Struck:
    """A fault that came, and what followed."""

    kind: str
    what: str
    at: float  # seconds since the study's start
    progress: float
    away: float
    back: float | None = None  # seconds from the strike until the work was further than it had been
    told: list[str] = field(default_factory=list)  # what the study's journal says was tried again, and why
    ends: list[str] = field(default_factory=list)  # unwanted ends of the driver
    repeated: list[str] = field(default_factory=list)  # results that existed before it, and were made again

    @property
    def survived(self) -> bool:
        silent = self.kind in TOLD and not self.told
        return self.back is not None and not (self.ends or self.repeated or silent)


@dataclass
class Round:
    """What one study went through and came to."""

    seconds: float
    code: int | None
    struck: list[Struck]
    unstruck: list[str]  # planned, but nothing was found to strike
    problems: list[str]
    comparison: Comparison | None = None

    @property
    def good(self) -> bool:
        equal = self.comparison is None or self.comparison.equal
        return self.code == 0 and equal and not self.problems and all(one.survived for one in self.struck)


def plan(kinds: Sequence[str], seed: int) -> list[Planned]:
    """The faults in an order, at moments and for durations that the seed decides."""
    chance = random.Random(seed)
    names = chance.sample(list(kinds), len(kinds))
    width = (_LAST - _FIRST) / max(1, len(names))
    return [
        Planned(
            FAULTS[name], _FIRST + width * (i + chance.random() * 0.5), round(chance.uniform(*FAULTS[name].away), 1)
        )
        for i, name in enumerate(names)
    ]


def run_round(stage: Stage, planned: Sequence[Planned], *, seed: int, say: Callable[[str], None]) -> Round:
    """Run the study on a stage to its end under these faults."""
    play = _Play(stage, planned, random.Random(seed + 1), say)
    stage.driver.start()
    while play.next_one():
        pass
    play.finish()
    seconds = time.monotonic() - play.began
    unstruck = [one.fault.name for one in play.pending]
    return Round(seconds, stage.driver.code, play.struck, unstruck, _problems(stage, play))


class _Play:
    def __init__(
        self, stage: Stage, planned: Sequence[Planned], chance: random.Random, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.stage, self.chance, self.say = stage, chance, say
        self.began, self.began_at = time.monotonic(), time.time()
        self.pending = list(planned)
        self.struck: list[Struck] = []
        self.before: list[Marks] = []
        self.restarts = 0

    def next_one(self) -> bool:
        """Wait until a fault is due and finds something to strike, and see the study through it. False: none is left.

        One that finds nothing (no evaluation runs, say) does not hold up those after it.
        """
        hits: list[tuple[Planned, Hit, float]] = []

        def struck() -> bool:
            self.supervise()
            progress = self.stage.watch.progress()
            for planned in [one for one in self.pending if one.at <= progress and self.stage.driver.code is None]:
                at = time.monotonic()  # before it strikes: its consequences come at once
                hit = planned.fault.strike(self.stage, self.chance)
                if hit is not None:
                    hits.append((planned, hit, at))
                    return True
            return self.is_over()

        if not self.pending or not wait_for(struck, seconds=_PATIENCE) or not hits:
            return False
        planned, hit, at = hits[0]
        self.pending.remove(planned)
        self.see_through(planned, hit, at)
        return True

    def see_through(self, planned: Planned, hit: Hit, at: float) -> None:
        """Mend what was struck at the time `at`, and wait until the work is further than it was."""
        kind, watch = planned.fault.name, self.stage.watch
        self.before.append(watch.results())
        struck = Struck(kind, hit.what, at - self.began, watch.progress(), planned.away)
        self.struck.append(struck)
        self.say(f"{struck.at:5.0f} s, {struck.progress:4.0%}: {kind}: {struck.what}")
        self.wait(lambda: time.monotonic() - at >= planned.away, patience=planned.away + 1)
        complaint = hit.mend()
        struck.ends += [complaint] if complaint else []
        seen = watch.images()
        if self.wait(lambda: self.is_back(hit, kind, self.began_at + struck.at, seen), patience=_PATIENCE):
            struck.back = time.monotonic() - at
        self.say(f"        back after {struck.back:.0f} s" if struck.back is not None else "        not back")

    def is_back(self, hit: Hit, kind: str, at: float, seen: dict[str, int]) -> bool:
        """Is the work that was interrupted further than it was?"""
        stage = self.stage
        if kind == "mlflow":
            return stage.tracker is not None and stage.tracker.answers()
        if kind == "evaluator":
            return any(_is_second_try(event) and event["time"] > at for event in stage.watch.events())
        images, all_or_one = stage.watch.images(), any if kind in EVERYTHING else all
        return all_or_one(
            (stage.watch.out / "trials" / trial / "result.json").exists()
            or (
                images.get(trial, 0) > seen.get(trial, 0)
                and bool(training(stage, trial=trial, after=at if hit.deadly else 0.0))
            )
            for trial in hit.trials
        )

    def wait(self, condition: Callable[[], bool], *, patience: float) -> bool:
        def met() -> bool:
            self.supervise()
            return condition()

        return wait_for(met, seconds=patience)

    def supervise(self) -> None:
        """A driver that ended though nobody killed it is started again, and that is held against it."""
        code = self.stage.driver.code
        if code in (None, 0) or self._is_by_the_fault(code) or self.restarts >= _MAX_RESTARTS:
            return
        self.restarts += 1
        last = [line for line in self.stage.driver.text().splitlines() if line.strip()][-1:]
        end = f"the driver ended with {code}: {last[0] if last else ''}"
        self.say(f"        {end}")
        if self.struck:
            self.struck[-1].ends.append(end)
        self.stage.driver.start()

    def _is_by_the_fault(self, code: int | None) -> bool:
        if not self.struck or self.struck[-1].back is not None:
            return False
        return self.struck[-1].kind == "head" or (self.struck[-1].kind == "driver" and code == -9)

    def is_over(self) -> bool:
        return self.stage.driver.code == 0

    def finish(self) -> None:
        """Wait for the study's end, and read in its journal what was tried again after which fault."""
        self.wait(self.is_over, patience=2 * _PATIENCE)
        final, events = self.stage.watch.results(), self.stage.watch.events()
        moments = [self.began_at + struck.at for struck in self.struck] + [float("inf")]
        for i, struck in enumerate(self.struck):
            struck.repeated = new_or_changed(self.before[i], final)
            struck.repeated += started_again(events, self.before[i], since=moments[i])
            struck.told = [
                f"{event['key']}: {event['message']}".replace(str(self.stage.watch.out), "STUDY") for event in events
                if event["event"] == "retry" and moments[i] <= event["time"] < moments[i + 1]
            ]  # fmt: skip


def _is_second_try(event: Mapping[str, Any]) -> bool:
    """Is it the good end of an evaluation that had to be tried again?"""
    facts = [event["event"], event.get("kind"), event.get("status")]
    return facts == ["ended", "evaluation", "done"] and int(event["attempt"]) > 1


def _problems(stage: Stage, play: _Play) -> list[str]:
    """What is wrong in the end, beside the figures."""
    problems = [f"the driver's last exit code is {stage.driver.code}"] if stage.driver.code != 0 else []
    if play.restarts and not play.struck:
        problems.append("the driver ended by itself before any fault")
    problems += [f"two results of one evaluation: {what}" for what in stage.watch.doubles()]
    if not wait_for(lambda: not stage.left_over(), seconds=30):
        problems += [f"orphan: {what}" for what in stage.left_over()]
    if stage.tracker is not None:
        problems += _differences(stage)
    return problems


def _differences(stage: Stage) -> list[str]:
    """Where MLflow does not hold the points of the final table, each once."""
    assert stage.tracker is not None
    held, twice = stage.tracker.evaluated()
    sent = sorted((key, step, value) for (_, key, step), value in held.items() if not key.endswith("_stderr"))
    problems = [f"MLflow holds it twice: {what}" for what in twice]
    if sent != table_points(stage.watch):
        problems.append(f"MLflow holds {len(sent)} points, the table {len(table_points(stage.watch))}, not the same")
    return problems


def table_points(watch: StudyWatch) -> list[tuple[str, int, float]]:
    """The measured points of the final table, as MLflow calls them: metric/split, images, value."""
    with open(watch.out / "law" / "points.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"]]  # the gap of two splits is in the table only
    return sorted((f"{row['metric']}/{row['split']}", int(row["images"]), float(row["value"])) for row in rows)


def judge(undisturbed: StudyWatch, disturbed: StudyWatch, result: Round) -> None:
    """Compare the final tables, and how many results there are."""
    try:
        result.comparison = compare(undisturbed, disturbed)
    except (OSError, KeyError, StopIteration, AssertionError) as error:
        result.problems.append(f"no table to compare: {error}")
    if len(undisturbed.results()) != len(disturbed.results()):
        result.problems.append(f"{len(disturbed.results())} results instead of {len(undisturbed.results())}")
