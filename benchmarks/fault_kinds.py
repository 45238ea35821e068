"""The faults: what is struck, and how it is mended. Each is what happens to clusters; none is known to the study."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.fault_cluster import HEAD
from benchmarks.fault_marks import command_of, found, kill, kill_all, mark_of
from benchmarks.fault_stage import Stage, wait_for
from benchmarks.fault_watch import last_written, trial_in

# A process is struck in the middle of its work: this long after it began, with a record of its own behind it.
_SETTLED_SECONDS = 2.0
_GONE_SECONDS = 30.0
_NOTICED_SECONDS = 180.0


@dataclass(frozen=True)
class Hit:
    """What was struck."""

    what: str
    trials: tuple[str, ...] = ()  # whose work was interrupted
    mend: Callable[[], str | None] = lambda: None  # returns what is wrong, if something is
    deadly: bool = True  # these trials' processes end by it, so others must take their work up


Strike = Callable[[Stage, random.Random], Hit | None]  # None: nothing there to strike yet


@dataclass(frozen=True)
class Fault:
    """One kind."""

    name: str
    about: str
    strike: Strike
    away: tuple[float, float] = (0.0, 0.0)  # seconds until it is mended, from and to


def _pick(items: Sequence[psutil.Process], chance: random.Random) -> psutil.Process | None:
    return chance.choice(sorted(items, key=lambda process: process.pid)) if items else None


def training(stage: Stage, *, mark: str = "", trial: str | None = None, after: float = 0.0) -> list[psutil.Process]:
    """Training processes that have made records in this life, which began later than `after` [seconds since 1970]."""
    busy = []
    for process in found(mark or stage.token, where=lambda command: "trainer/run.py" in command):
        with contextlib.suppress(psutil.Error):
            name, began = trial_in(command_of(process)), process.create_time()
            wanted = name is not None and name == (trial or name) and began > after
            if wanted and last_written(stage.watch.out / "trials" / str(name)) > began + _SETTLED_SECONDS:
                busy.append(process)
    return busy


def _trials(processes: Sequence[psutil.Process]) -> tuple[str, ...]:
    return tuple(sorted({trial for process in processes if (trial := trial_in(command_of(process)))}))


def _where(stage: Stage, process: psutil.Process) -> str:
    return mark_of(process).removeprefix(f"{stage.token}/")


def _driver(stage: Stage, chance: random.Random) -> Hit | None:
    running = _trials(training(stage))
    if stage.driver.code is not None or not running:
        return None
    return Hit(f"driver, process {stage.driver.kill()}", running, stage.driver.start)


def _trainer(stage: Stage, chance: random.Random) -> Hit | None:
    victim = _pick(training(stage), chance)
    if victim is None:
        return None
    trial, where = trial_in(command_of(victim)) or "", _where(stage, victim)
    kill([victim])
    return Hit(f"training process {victim.pid} of {trial} on {where}", (trial,))


def _keeper(stage: Stage, chance: random.Random) -> Hit | None:
    """The parent of a training process: Ray's worker that watches it."""
    victim = _pick(training(stage), chance)
    parent = victim.parent() if victim is not None else None
    if victim is None or parent is None:
        return None
    trial, where = trial_in(command_of(victim)) or "", _where(stage, victim)
    kill([parent])
    return Hit(f"Ray worker {parent.pid} that keeps {trial} on {where}", (trial,))


def _freeze(stage: Stage, chance: random.Random) -> Hit | None:
    victim = _pick(training(stage), chance)
    if victim is None:
        return None
    trial = trial_in(command_of(victim)) or ""
    victim.send_signal(signal.SIGSTOP)
    return Hit(f"training process {victim.pid} of {trial}", (trial,), lambda: _continue(victim), deadly=False)


def _continue(process: psutil.Process) -> None:
    if process.is_running():
        process.send_signal(signal.SIGCONT)


def _evaluator(stage: Stage, chance: random.Random) -> Hit | None:
    busy = found(stage.token, where=lambda command: command.startswith("ray::Eval") and ".run" in command)
    victim = _pick(busy, chance)
    if victim is None:
        return None
    what = f"evaluation process {victim.pid} on {_where(stage, victim)}"
    kill([victim])
    return Hit(what)


def _busy_nodes(stage: Stage) -> dict[str, tuple[str, ...]]:
    """Nodes with training processes in the middle of their work, and their trials."""
    found_on = {name: training(stage, mark=f"{stage.token}/{name}") for name in stage.cluster.names}
    return {
        name: _trials(processes) for name, processes in found_on.items() if processes
    }  # fmt: skip


def _node(stage: Stage, chance: random.Random) -> Hit | None:
    busy = _busy_nodes(stage)
    if not busy:
        return None
    name = chance.choice(sorted(busy))
    stage.cluster.kill(name)
    return Hit(f"{name} with {', '.join(busy[name])}", busy[name], lambda: stage.cluster.add(name))


def _head(stage: Stage, chance: random.Random) -> Hit | None:
    """Ray's head: with it the cluster, and with that the driver."""
    running = training(stage)
    if stage.driver.code is not None or not running:
        return None
    return Hit(
        f"head, {kill_all(f'{stage.token}/{HEAD}')} processes", _trials(running), lambda: _another_cluster(stage)
    )


def _another_cluster(stage: Stage) -> str | None:
    """The driver cannot move to another cluster, so it must end by itself before it is started again."""
    noticed = wait_for(lambda: stage.driver.code is not None, seconds=_NOTICED_SECONDS)
    if not noticed:
        stage.driver.kill()
    stage.cluster.renew()
    stage.driver.start()
    return None if noticed else f"the driver did not notice it in {_NOTICED_SECONDS:.0f} s, and had to be killed"


def _cable(stage: Stage, chance: random.Random) -> Hit | None:
    busy = _busy_nodes(stage)
    if not busy:
        return None
    name = chance.choice(sorted(busy))
    stage.cluster.cut(name, off=True)
    return Hit(f"{name} with {', '.join(busy[name])}", busy[name], lambda: _plug_in(stage, name), deadly=False)


def _plug_in(stage: Stage, name: str) -> None:
    """Ray lets no node back that it has given up: its raylet ends, and the host starts another."""
    stage.cluster.cut(name, off=False)
    if wait_for(lambda: not found(f"{stage.token}/{name}"), seconds=_GONE_SECONDS):
        stage.cluster.add(name)


def _tracker(stage: Stage, chance: random.Random) -> Hit | None:
    if stage.tracker is None or not stage.tracker.answers():
        return None
    return Hit(f"MLflow server, {stage.tracker.kill()} processes", mend=stage.tracker.start)


def _disk(stage: Stage, chance: random.Random) -> Hit | None:
    running = _trials(training(stage))
    if stage.disk is None or not running:
        return None
    return Hit(f"{stage.disk.fill() / 1e6:.0f} MB of ballast", running, stage.disk.free, deadly=False)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("driver", "kill -9 of the study's driver; the same command is given again", _driver, (1, 5)),
        Fault("trainer", "kill -9 of a training process", _trainer),
        Fault("node", "a whole node dies: raylet, workers and all they started; it comes back", _node, (10, 20)),
        Fault("long node", "a whole node dies and stays away so long that trials shrink", _node, (50, 60)),
        Fault("head", "Ray's head dies; the driver is started again on another cluster", _head),
        Fault("mlflow", "kill -9 of the MLflow server; it is started again", _tracker, (10, 20)),
        Fault("disk", "the study's disk is full to the last byte for a while", _disk, (10, 15)),
        Fault("evaluator", "kill -9 of a process that evaluates", _evaluator),
        Fault("worker", "kill -9 of the Ray worker that watches a training process", _keeper),
        Fault("freeze", "a training process is stopped for a while (SIGSTOP, SIGCONT)", _freeze, (5, 10)),
        Fault("cable", "a host's cable is pulled; plugged in again later", _cable, (60, 70)),
    )
}
