"""Runs that are killed: starts lives of a run quickly, kills a process at a chosen point, looks at what is left.

Importing torch and DeepSpeed takes seconds, so every life is forked from a server that has imported them
(multiprocessing's forkserver) and starts no thread of its own. A life is `trainer/run.py`'s command line, unchanged:
what a test needs to know of it (which step it made, when it saved) and the point where it kills are put around the
trainer's functions in that process alone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from trainer.checkpoint import MANIFEST, list_checkpoints, verify
from trainer.config.run import load_config
from trainer.ports import free_port
from trainer.tracking.records import read_train_records

# Points of a save that every process passes, and those that only the main process does.
EVERYWHERE = ("before the shard", "in the shard", "after the shard")
ON_MAIN = (
    "before the manifest", "before the rename", "after the rename", "before the export", "in the export",
    "before the export's rename", "before the snapshot", "in the snapshot", "before the snapshot's rename",
    "before the removal", "in the removal",
)  # fmt: skip
# What is made from a checkpoint, by its folder in the run's.
MADE = {"exports": "export", "ema_snapshots": "snapshot"}
# What a life imports; compile_fx stands for all that DeepSpeed and torch import at the first step.
_PRELOAD = ["deepspeed", "torch._inductor.compile_fx", "trainer.loop", "trainer.run"]
PATIENCE = 60.0  # seconds in which the others must end by themselves when one process is killed, ...
LAUNCHER = 3.0  # ... but while they are still looking for each other, when it is the launcher that ends them


@dataclass(frozen=True)
class Kill:
    """`victim` dies when process `at` comes to `point` of the life's first save."""

    point: str
    at: int
    victim: int


# ---- in a rank ------------------------------------------------------------------------------------------------------


def live(arguments: list[str], environment: Mapping[str, str], folder: Path, kill: Kill | None) -> None:
    """Be one rank of a run for as long as it lives; `folder` gets its output and its events."""
    rank = int(environment["RANK"])
    log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a killed process leaves behind
    from trainer.run import command_line

    _Hooks(rank, folder, kill).install()
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    sys.argv = ["trainer/run.py", *arguments]
    command_line()


class _Hooks:
    """What is put around the trainer's functions in a rank."""

    def __init__(self, rank: int, folder: Path, kill: Kill | None) -> None:
        self.rank, self.folder, self.kill = rank, folder, kill
        self.saving = self.removing = False
        # Written line by line, so that the lines outlive the process.
        self.events, self.inputs = (
            os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("events", "inputs")
        )

    def event(self, name: str, nimg: int = 0) -> None:
        os.write(self.events, f"{time.monotonic()} {nimg} {name}\n".encode())

    def point(self, name: str) -> None:
        if self.saving and self.kill is not None and (self.kill.point, self.kill.at) == (name, self.rank):
            os.kill(int((self.folder / f"pid.{self.kill.victim}").read_text()), signal.SIGKILL)

    def install(self) -> None:
        from trainer import checkpoint, export, inputs, loop, outputs, saver

        self._around(loop, "train", self._met)
        self._around(loop.Run, "train", self._train)
        self._around(loop.Run, "step", self._step)
        self._around(inputs.InputSource, "make", self._make)
        self._around(saver, "write_checkpoint", self._write_checkpoint)
        self._around(checkpoint, "write_mapping", self._write_mapping)
        self._around(checkpoint, "write_json", self._write_json)
        self._around(export, "write_tensors", self._write_tensors)
        self._around(outputs, "write_export", self._write_export)
        self._around(loop, "remove_old", self._remove_old)
        self._around(os, "rename", self._rename)
        self._around(os, "unlink", self._unlink)

    @staticmethod
    def _around(owner: Any, name: str, hook: Callable[..., Any]) -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: hook(real, *args, **kwargs))

    def _met(self, real: Callable[..., int], *args: Any) -> int:
        self.event("met")
        return real(*args)

    def _train(self, real: Callable[..., int], run: Any, *args: Any) -> int:
        self.event(f"restored {sampler_digest(run.timesteps.state())}", run.nimg)
        return real(run, *args)

    def _step(self, real: Callable[..., None], run: Any, *args: Any) -> None:
        real(run, *args)
        self.event("step", run.nimg + run.config.train.global_batch)

    def _make(self, real: Callable[..., Any], source: Any, nimg: int) -> Any:
        made = real(source, nimg)
        images = zip(made.images, made.labels, made.u, made.noise, strict=True)
        digests = [hashlib.sha256(b"".join(x.numpy().tobytes() for x in image)).hexdigest() for image in images]
        os.write(self.inputs, (json.dumps([nimg, digests]) + "\n").encode())
        return made

    def _write_checkpoint(self, real: Callable[..., Path], folder: Path, snapshot: Any, peers: Any) -> Path:
        self.saving = True
        self.event("writing", snapshot.state.nimg)
        path = real(folder, snapshot, peers)
        self.event("written", snapshot.state.nimg)
        return path

    def _write_mapping(self, real: Callable[..., Any], path: Path, tensors: dict[str, Tensor]) -> Any:
        if not path.name.startswith("rank-"):
            return real(path, tensors)
        self.point("before the shard")
        entry = real(path, _Halfway(tensors, lambda: self.point("in the shard")))
        self.point("after the shard")
        return entry

    def _write_json(self, real: Callable[..., None], path: Path, value: Any) -> None:
        if path.name == MANIFEST:
            self.point("before the manifest")
        real(path, value)

    def _rename(self, real: Callable[..., None], source: Any, target: Any, **kwargs: Any) -> None:
        kind = Path(source).parent.name if str(source).endswith(".tmp") else ""
        if kind:
            self.point("before the rename" if kind == "checkpoints" else f"before the {MADE[kind]}'s rename")
        real(source, target, **kwargs)
        if kind == "checkpoints":
            self.point("after the rename")

    def _write_export(self, real: Callable[..., Path], checkpoint: Path, folder: Path, **kwargs: Any) -> Path:
        self.point(f"before the {MADE[folder.name]}")
        self.event("exporting", int(checkpoint.name))
        path = real(checkpoint, folder, **kwargs)
        self.event("exported", int(checkpoint.name))
        return path

    def _write_tensors(self, real: Callable[..., Any], path: Path, specs: Any, read: Callable[[str], Tensor]) -> Any:
        middle, made = list(specs)[len(specs) // 2], MADE[path.parents[1].name]

        def read_on(name: str) -> Tensor:
            if name == middle:
                self.point(f"in the {made}")
            return read(name)

        return real(path, specs, read_on)

    def _remove_old(self, real: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.point("before the removal")
        self.event("removing")
        self.removing = True
        real(*args, **kwargs)
        self.removing = False
        self.event("removed")

    def _unlink(self, real: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if self.removing:
            self.point("in the removal")


class _Halfway(dict[str, Tensor]):
    """The tensors of a shard; calls back when half of them have been taken."""

    def __init__(self, tensors: dict[str, Tensor], then: Callable[[], None]) -> None:
        super().__init__(tensors)
        self._middle, self._then = list(tensors)[len(tensors) // 2], then

    def __getitem__(self, name: str) -> Tensor:
        if name == self._middle:
            self._then()
        return super().__getitem__(name)


# ---- in the test ----------------------------------------------------------------------------------------------------


class Life:
    """The processes of one life of a run."""

    def __init__(self, arguments: list[str], world_size: int, folder: Path, kill: Kill | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder, self.began = folder, time.monotonic()
        common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        self._processes = [
            context.Process(
                target=live,
                args=(arguments, common | {"RANK": str(r), "LOCAL_RANK": str(r)}, folder, kill),
                daemon=True,
            )
            for r in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def kill(self, rank: int) -> None:
        """kill -9, where it has not ended."""
        self._processes[rank].kill()

    def ended(self) -> bool:
        return any(p.exitcode is not None for p in self._processes)

    def sleep(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait so long, or until something is so or a process has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.ended() and not until():
            time.sleep(min(0.02, max(0.0, end - time.monotonic())))

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes; None for a process that did not end by itself in time, and is killed."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        return codes

    def events(self, rank: int = 0) -> list[tuple[float, int, str]]:
        """(moment, nimg, what) of a rank, in order."""
        path = self.folder / f"events.{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(float(when), int(nimg), what) for when, nimg, what in (line.split(maxsplit=2) for line in lines)]

    def steps(self) -> int:
        """Images seen after the last step of this life; 0 when it made none."""
        return max((nimg for _, nimg, what in self.events() if what == "step"), default=0)

    def doing(self, moment: float) -> str:
        """What the main process was doing then."""
        if self.first_step() > moment:
            return "start-up"
        now, becomes = "training", {"writing": "saving", "exporting": "exporting", "removing": "removing"}
        for when, _, what in self.events():
            if when > moment:
                break
            if what in ("written", "exported", "removed"):
                now = "training"
            now = becomes.get(what, now)
        return now

    def has_met(self) -> bool:
        """Whether every process had found the others: from then on they know of each other's end."""
        return all(any(what == "met" for _, _, what in self.events(rank)) for rank in range(len(self._processes)))

    def first_step(self) -> float:
        return min((when for when, _, what in self.events() if what == "step"), default=float("inf"))

    def text(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.folder.glob("log.*")))


def start_server() -> None:
    """Start the server that lives are forked from, with all that a life imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        first = context.Process(target=int)
        first.start()
        first.join()


@dataclass
class Tally:
    """What became of many lives."""

    kills: Counter[str] = field(default_factory=Counter)  # by what the main process was doing
    lives: int = 0
    runs: int = 0
    launcher: int = 0  # lives whose other process was ended as a launcher does, since they had not met yet
    stuck: int = 0  # lives whose other process should have ended by itself, and did not
    slowest_end: float = 0.0  # seconds until it had
    wasted_images: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        moments = ", ".join(f"{number} {moment}" for moment, number in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({moments}) in {self.lives} lives of {self.runs} runs; "
            f"{self.wasted_images} images computed twice; survivors: {self.launcher} ended by the launcher, "
            f"{self.stuck} stuck, the others ended within {self.slowest_end:.1f} s; {self.seconds:.0f} s in all"
        )


class KilledRun:
    """A run that is started again after every kill, with its invariants checked each time."""

    def __init__(
        self, arguments: list[str], folder: Path, tally: Tally, *, world_size: int = 2, straight: Path | None = None
    ) -> None:
        """`straight`: the folder of the same run without kills, with all of its checkpoints kept."""
        self.folder, self.tally, self._straight = folder, tally, straight
        self._arguments = [*arguments, f"run.folder={folder}"]
        self._world_size, self._lives = world_size, 0
        tally.runs += 1

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def newest(self) -> int:
        """Images seen at the newest valid checkpoint, 0 without one."""
        path = newest_checkpoint(self.folder)
        return int(path.name) if path else 0

    def start(self, kill: Kill | None = None) -> Life:
        self._lives += 1
        self.tally.lives += 1
        lives = self.folder.with_name(f"{self.folder.name}.lives")
        self._start_at, self._start_sampler = self.newest(), sampler_digest(sampler_state(self.folder))
        return Life(self._arguments, self._world_size, lives / f"{self._lives:03d}", kill)

    def finish(self) -> Life:
        """A life to the end of the run."""
        life = self.start()
        self._finished(life, life.wait(240))
        return life

    def die_at(self, kill: Kill) -> Life:
        """A life that ends at a point of its first save."""
        life = self.start(kill)
        life.sleep(PATIENCE)
        self._count(life, time.monotonic(), kill.victim)
        self.tally.kills[kill.point] += 1
        return life

    def die_at_random(self, rng: random.Random, start_up: float, span: float, in_start_up: float = 0.25) -> Life:
        """A life that ends at a random moment of its start-up (that share of lives) or of `span` seconds after it."""
        life = self.start()
        victim, early = rng.randrange(self._world_size), rng.random() < in_start_up
        if early:
            life.sleep(rng.uniform(0, start_up))
        else:
            life.sleep(240, until=lambda: life.steps() > 0)
            life.sleep(rng.uniform(0, span))
        return self.kill(life, victim)

    def kill(self, life: Life, victim: int) -> Life:
        """Kill a process now; a run that has finished meanwhile is let be."""
        if life.ended():
            self._finished(life, life.wait(PATIENCE))
            return life
        moment = time.monotonic()
        life.kill(victim)
        if self._count(life, moment, victim):
            self.tally.kills[life.doing(moment)] += 1
        return life

    def _finished(self, life: Life, codes: list[int | None]) -> None:
        assert codes == [0] * self._world_size, (codes, life.text())
        self.check(life)

    def _count(self, life: Life, moment: float, victim: int) -> bool:
        """See the others end too; False when the life had come to its own end before the kill."""
        met = life.has_met()
        codes = life.wait(PATIENCE if met else LAUNCHER)
        if codes[victim] == 0:
            self._finished(life, codes)
            return False
        assert codes[victim] == -signal.SIGKILL, (codes, life.text())
        if None not in codes:
            self.tally.slowest_end = max(self.tally.slowest_end, time.monotonic() - moment)
        self.tally.launcher += None in codes and not met
        self.tally.stuck += None in codes and met
        self.check(life)
        self.tally.wasted_images += max(0, life.steps() - self.newest())
        return True

    def check(self, life: Life) -> None:
        """What a life left: nothing half-made under a good name, and nothing lost but what was not saved yet."""
        for path in list_checkpoints(self.folder / "checkpoints"):
            assert verify(path) is None, (path, verify(path), life.text())
        for path in made_from_checkpoints(self.folder):
            assert verify(path) is None, (path, verify(path), life.text())
        # A save waits for the one before it: at most the last one begun may be missing.
        begun = [nimg for _, nimg, what in life.events() if what == "writing"]
        assert self.newest() >= [self._start_at, *begun][-2 if begun else -1], (begun, self.newest(), life.text())
        restored = [(nimg, what) for _, nimg, what in life.events() if what.startswith("restored")]
        if restored and self._start_at:
            assert restored == [(self._start_at, f"restored {self._start_sampler}")]
        if self._straight is not None and self.newest():
            name = f"checkpoints/{self.newest():012d}"
            assert_same_checkpoint(self.folder / name, self._straight / name)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest one that verifies; unlike a resume, this leaves the folder alone."""
    return next((path for path in list_checkpoints(run / "checkpoints") if verify(path) is None), None)


def sampler_state(run: Path) -> dict[str, Tensor]:
    """The timestep sampler's history in a run's newest checkpoint, {} without one."""
    checkpoint = newest_checkpoint(run)
    file = checkpoint / "sampler.safetensors" if checkpoint else None
    return load_file(file) if file and file.exists() else {}


def sampler_digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Bit for bit: weights, moments, averages, sampler state, update counts."""
    files, expected = (json.loads((c / MANIFEST).read_text())["files"] for c in (ours, theirs))
    assert files.keys() == expected.keys()
    tensors = {name: load_file(theirs / name) for name in expected if name.endswith(".safetensors")}
    for name, others in tensors.items():
        mine = load_file(ours / name)
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[key], others[key]) for key in others), (ours, name)
    kinds = {key.split("|")[0] for name in tensors if name.startswith("rank-") for key in tensors[name]}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", *load_config(ours / "config.yaml").train.averages}
    state, other_state = (json.loads((c / "state.json").read_text()) for c in (ours, theirs))
    assert all(state[key] == other_state[key] for key in ("nimg", "num_updates", "compute", "data_fingerprint"))


def assert_same_run(run: Path, straight: Path) -> None:
    """Bit for bit: the last checkpoint, all exports and snapshots, and what was logged."""
    ours, theirs = newest_checkpoint(run), newest_checkpoint(straight)
    assert ours is not None
    assert theirs is not None
    assert ours.name == theirs.name
    assert_same_checkpoint(ours, theirs)
    assert exported(run) == exported(straight)
    assert logged(run) == logged(straight)


def made_from_checkpoints(run: Path) -> list[Path]:
    """Exports, and snapshots of averages."""
    return [path for folder in MADE for path in run.glob(f"{folder}/0*")]


def exported(run: Path) -> dict[str, str]:
    """Checksums of all weights in them."""
    found: dict[str, str] = {}
    for path in made_from_checkpoints(run):
        files = json.loads((path / MANIFEST).read_text())["files"]
        found |= {f"{path.relative_to(run)}/{n}": e["sha256"] for n, e in files.items() if n.endswith(".safetensors")}
    return found


def logged(run: Path) -> dict[int, dict[str, float]]:
    """By nimg: every figure of the training itself, but for the gradient noise scale, which is smoothed over a life."""
    return {
        record.nimg: {
            name: value for name, value in record.values.items()
            if name.startswith("train/") and name != "train/grad_noise_scale"
        }
        for record in read_train_records(run)
    }  # fmt: skip


def inputs_seen(life: Life) -> dict[int, list[str]]:
    """By nimg: the checksums of a step's images with their labels, draws and noise, over all processes."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(life.folder.glob("inputs.*")):
        for line in path.read_text().splitlines():
            nimg, digests = json.loads(line)
            found[nimg] += digests
    return dict(found)
