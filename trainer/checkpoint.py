"""Checkpoints: complete or absent, checksummed, and free of the layout that wrote them.

A checkpoint is a folder `<nimg>` holding one safetensors file of fragments per process, the run's state, the config
and, written last, a manifest with every file's size and sha256. It is written under a temporary name and renamed
when all is on the disk; it is valid if and only if its manifest verifies. Any number of processes at any ZeRO stage
can read it: a fragment says which elements of which parameter it holds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import AgreedError, UserError, disk_message
from data_pipeline.files import fsync_file, sha256_file, write_atomic, write_json
from trainer.engine import MOMENTS, Engine, Fragment
from trainer.processes import Processes

MANIFEST = "manifest.json"
KINDS = ("weight", *MOMENTS, "ema")
FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """What a run is at a moment, beside its tensors."""

    nimg: int
    num_updates: int
    compute: float  # training FLOPs so far
    seconds: float  # of training so far, over all lives of the run
    data_fingerprint: str
    layout: dict[str, Any]  # of the processes that wrote it


def checkpoint_name(nimg: int) -> str:
    return f"{nimg:012d}"


def save_checkpoint(
    folder: Path,
    *,
    engine: Engine,
    ema: list[Tensor],
    sampler_state: dict[str, Tensor],
    state: RunState,
    config_yaml: str,
    processes: Processes,
) -> Path:
    """Write `folder/<nimg>` together with all processes; returns its path.

    Raises UserError on every process when any of them could not write; earlier checkpoints stay as they are.
    """
    final = folder / checkpoint_name(state.nimg)
    temporary = folder / f".{final.name}.tmp"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    with _AgreedFailure(processes) as attempt:
        if processes.is_main:
            attempt(prepare)
    listing: dict[str, Any] = {}
    with _AgreedFailure(processes, clean=temporary) as attempt:
        listing = attempt(lambda: _write_own(temporary, engine.owned, ema, processes)) or {}
    listings = processes.gather_objects(listing)

    def finish() -> None:
        files = {name: entry for part in listings for name, entry in part.items()}
        files |= _write_common(temporary, sampler_state, state, config_yaml)
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        write_json(temporary / MANIFEST, {"format": FORMAT, "nimg": state.nimg, "shapes": shapes, "files": files})
        if final.exists():  # a damaged one of the same name, skipped at resume
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync_file(folder)

    with _AgreedFailure(processes, clean=temporary) as attempt:
        if processes.is_main:
            attempt(finish)
    return final


class _AgreedFailure:
    """Runs a step that may fail on one process, and makes all processes fail together."""

    def __init__(self, processes: Processes, clean: Path | None = None) -> None:
        self._processes = processes
        self._clean = clean
        self._message: str | None = None

    def __enter__(self) -> Any:
        return self._attempt

    def _attempt(self, action: Any) -> Any:
        try:
            return action()
        except (OSError, SafetensorError) as error:
            self._message = disk_message(error) or f"{type(error).__name__}: {error}"
            return None

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            return
        messages = [m for m in self._processes.gather_objects(self._message) if m]
        if messages:
            if self._clean is not None and self._processes.is_main:
                shutil.rmtree(self._clean, ignore_errors=True)
            raise AgreedError(f"the checkpoint could not be written, the previous ones are intact: {messages[0]}")


def _write_own(folder: Path, owned: list[Fragment], ema: list[Tensor], processes: Processes) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    for fragment, average in zip(owned, ema, strict=True):
        parts = {"weight": fragment.weight, **fragment.moments, "ema": average}
        for kind, tensor in parts.items():
            tensors[f"{kind}|{fragment.name}|{fragment.offset}"] = tensor.detach().cpu().clone()
    path = folder / f"rank-{processes.rank:05d}.safetensors"
    save_file(tensors, path)
    return {path.name: _entry(path)}


def _write_common(folder: Path, sampler: dict[str, Tensor], state: RunState, config_yaml: str) -> dict[str, Any]:
    write_json(folder / "state.json", asdict(state))
    write_atomic(folder / "config.yaml", config_yaml)
    names = ["state.json", "config.yaml"]
    if sampler:
        save_file({key: value.cpu().contiguous() for key, value in sampler.items()}, folder / "sampler.safetensors")
        names.append("sampler.safetensors")
    return {name: _entry(folder / name) for name in names}


def _entry(path: Path) -> dict[str, Any]:
    fsync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


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
        """(name, tensor) of every parameter, one at a time; kind is "weight" or "ema"."""
        for name in self.shapes:
            yield name, self.whole(kind, name)

    def restore(self, engine: Engine, ema: list[Tensor]) -> None:
        """Fill this process's fragments: master weights, moments, averages and Adam's step count."""
        for fragment in engine.held:
            self.read_into(fragment.weight, "weight", fragment.name, fragment.offset)
            for kind, moment in fragment.moments.items():
                self.read_into(moment, kind, fragment.name, fragment.offset)
        for fragment, average in zip(engine.owned, ema, strict=True):
            self.read_into(average, "ema", fragment.name, fragment.offset)
        engine.num_updates = self.state.num_updates


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


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
