"""Checkpoints: complete or absent, checksummed, and free of the layout that wrote them.

A checkpoint is a folder `<nimg>` holding one safetensors file of fragments per process, the run's state, the config
and, written last, a manifest with every file's size and sha256. It is written under a temporary name and renamed
when all is on the disk; it is valid if and only if its manifest verifies. Any number of processes at any ZeRO stage
can read it: a fragment says which elements of which parameter it holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import AgreedError, UserError
from data_pipeline.files import file_entry, fsync_file, sha256_file, write_atomic, write_json
from trainer.engine import Engine, Fragment
from trainer.exits import failure
from trainer.tensor_files import write_mapping

MANIFEST = "manifest.json"
FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class RunState:
    """What a run is at a moment, beside its tensors."""

    nimg: int
    num_updates: int
    compute: float  # training FLOPs so far
    seconds: float  # of training so far, over all lives of the run
    data_fingerprint: str
    layout: dict[str, Any]  # of the processes that wrote it
    loss_scale: tuple[float, int] | None = None  # fp16: its value and the steps since its last change


@dataclass(frozen=True)
class Snapshot:
    """One process's part of a checkpoint."""

    state: RunState
    shapes: dict[str, tuple[int, ...]]  # of all parameters
    fragments: dict[str, Tensor]  # by "kind|parameter|offset": what this process owns
    sampler: dict[str, Tensor]  # the timestep sampler's history
    config_yaml: str


class Peers(Protocol):
    """The processes that write a checkpoint together."""

    @property
    def rank(self) -> int: ...

    def gather_objects(self, value: T) -> list[T]: ...


def checkpoint_name(nimg: int) -> str:
    return f"{nimg:012d}"


def fragment_tensors(owned: list[Fragment], averages: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """All that a process has to save, by the keys it has in a checkpoint; live views.

    `averages`: by name, tensors beside `owned`.
    """
    tensors: dict[str, Tensor] = {}
    for i, fragment in enumerate(owned):
        kinds = {"weight": fragment.weight, **fragment.moments} | {name: a[i] for name, a in averages.items()}
        tensors |= {f"{kind}|{fragment.name}|{fragment.offset}": tensor for kind, tensor in kinds.items()}
    return tensors


def write_checkpoint(folder: Path, snapshot: Snapshot, peers: Peers) -> Path:
    """Write `folder/<nimg>` together with all processes; returns its path.

    Raises AgreedError on every process when any of them could not write; earlier checkpoints stay as they are.
    """
    final = folder / checkpoint_name(snapshot.state.nimg)
    temporary = folder / f".{final.name}.tmp"
    is_main = peers.rank == 0

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        files = {name: entry for part in listings for name, entry in part.items()}
        files |= _write_common(temporary, snapshot)
        shapes = {name: list(shape) for name, shape in snapshot.shapes.items()}
        write_json(
            temporary / MANIFEST, {"format": FORMAT, "nimg": snapshot.state.nimg, "shapes": shapes, "files": files}
        )
        if final.exists():  # a damaged one of the same name, skipped at resume
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync_file(folder)

    try:
        together(peers, begin if is_main else None)
        listings = together(peers, lambda: _write_own(temporary, snapshot, peers.rank))
        together(peers, finish if is_main else None)
    except AgreedError:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def together(peers: Peers, action: Callable[[], T] | None, what: str = "checkpoint") -> list[T]:
    """Do a step that may fail for want of disk, on those processes that have one; their results, in order of rank.

    Raises AgreedError on all processes where it failed on any, with the exit code of what it was there.
    """
    result, failed = None, None
    try:
        result = action() if action else None
    except Exception as error:  # whatever it is, the others must not wait for ever
        failed = failure(error)
    outcomes = peers.gather_objects((result, failed))
    failures = [failed for _, failed in outcomes if failed]
    if failures:
        message, code = failures[0]
        raise AgreedError(f"the {what} could not be written, earlier ones are intact: {message}", code)
    return [result for result, _ in outcomes if result is not None]


def _write_own(folder: Path, snapshot: Snapshot, rank: int) -> dict[str, Any]:
    name = f"rank-{rank:05d}.safetensors"
    return {name: write_mapping(folder / name, snapshot.fragments)}


def _write_common(folder: Path, snapshot: Snapshot) -> dict[str, Any]:
    write_json(folder / "state.json", asdict(snapshot.state))
    write_atomic(folder / "config.yaml", snapshot.config_yaml)
    files = {name: file_entry(folder / name) for name in ("state.json", "config.yaml")}
    if snapshot.sampler:
        name = "sampler.safetensors"
        files[name] = write_mapping(folder / name, snapshot.sampler)
    return files


class CheckpointReader:
    """Reads tensors of a checkpoint by name, in any cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = json.loads((path / MANIFEST).read_text())
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in manifest["shapes"].items()}
        self.state = RunState(**json.loads((path / "state.json").read_text()))
        self._files = [safe_open(path / f, framework="pt") for f in manifest["files"] if f.startswith("rank-")]
        self._parts: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)  # -> (offset, index of file)
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                kind, name, offset = key.split("|")
                self._parts[kind, name].append((int(offset), index))

    def whole(self, kind: str, name: str) -> Tensor:
        """One parameter's weight, average or moment in its own shape."""
        shape = self.shapes[name]
        out = torch.empty(shape, dtype=torch.float32)
        self.read_into(out.view(-1), kind, name, 0)
        return out

    def read_into(self, out: Tensor, kind: str, name: str, offset: int) -> None:
        """Fill `out` [n] with elements offset .. offset + n - 1 of the flattened parameter."""
        end, filled = offset + out.numel(), 0
        for start, index in sorted(self._parts[kind, name]):
            part = self._files[index].get_slice(f"{kind}|{name}|{start}")
            stop = start + part.get_shape()[0]
            low, high = max(offset, start), min(end, stop)
            if low < high:
                out[low - offset : high - offset].copy_(part[low - start : high - start])
                filled += high - low
        if filled != out.numel():
            raise UserError(
                f"{self.path}: holds {filled} of the {out.numel()} elements asked of {kind} {name!r}; "
                "the checkpoint belongs to another network."
            )

    def sampler_state(self) -> dict[str, Tensor]:
        path = self.path / "sampler.safetensors"
        if not path.exists():
            return {}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def weights(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter, one at a time; kind is "weight", "ema" or another average."""
        for name in self.shapes:
            yield name, self.whole(kind, name)

    def restore(self, engine: Engine, averages: dict[str, list[Tensor]]) -> None:
        """Fill this process's fragments: master weights, moments, averages; and what the optimizer counts."""
        for fragment in engine.held:
            self.read_into(fragment.weight, "weight", fragment.name, fragment.offset)
            for kind, moment in fragment.moments.items():
                self.read_into(moment, kind, fragment.name, fragment.offset)
        for kind, shadows in averages.items():
            for fragment, shadow in zip(engine.owned, shadows, strict=True):
                self.read_into(shadow, kind, fragment.name, fragment.offset)
        engine.num_updates = self.state.num_updates
        if engine.loss_scale and self.state.loss_scale:
            engine.loss_scale.set(*self.state.loss_scale)


def verify(path: Path) -> str | None:
    """None when every file of the checkpoint (or export) is what its manifest says, else what is wrong."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError):
        return "its manifest is damaged"
    for name, entry in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if sha256_file(file) != entry["sha256"]:
            return f"{name} does not match its checksum"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest (most images) first, valid or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not; those are set aside.

    Raises UserError when there are checkpoints and none is valid: starting fresh would silently lose a run.
    """
    skipped: list[str] = []
    damaged: list[Path] = []
    for path in list_checkpoints(folder):
        problem = verify(path)
        if problem is None:
            for other in damaged:  # else they would count among the newest that are kept
                set_aside(other)
            return path, skipped
        damaged.append(path)
        skipped.append(f"skipped checkpoint {path.name}: {problem}")
    if skipped:
        raise UserError(
            f"none of the checkpoints in {folder} is valid:\n  " + "\n  ".join(skipped)
            + "\nRestore one from a copy, or move the run folder away to start afresh."
        )  # fmt: skip
    return None, []


def set_aside(path: Path) -> None:
    """Keep a damaged checkpoint for inspection, under a name that no longer counts as one."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def kept_for_good(saves: Iterable[int], every: int | None) -> set[int]:
    """Of the moments of saves (images seen), the first from each multiple of `every` on."""
    firsts = {n // every: n for n in sorted(saves, reverse=True) if n >= every} if every else {}
    return set(firsts.values())


def remove_old(folder: Path, keep: int, *, every: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and those kept for good."""
    paths = list_checkpoints(folder)
    stay = kept_for_good([int(path.name) for path in paths], every)
    for path in paths[keep:]:
        if int(path.name) not in stay:
            leaving = path.with_name(f".{path.name}.tmp")  # killed half-way, it must not look like a checkpoint
            with contextlib.suppress(OSError):
                path.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)
