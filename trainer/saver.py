"""Checkpoints written while training goes on.

At a save every process copies what it owns into buffers of the host's memory, the same ones each time, and goes on;
a thread of its own writes them. The threads of all processes meet over a group of their own, so that a checkpoint is
complete on all of them or fails on all. A second save waits for the first: memory is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint import Snapshot, together, write_checkpoint
from trainer.processes import Processes

_PIECE = 1 << 28  # bytes of host memory allocated at once
_WRITE_TIMEOUT = timedelta(hours=2)  # what the slowest process's file may take
T = TypeVar("T")


class Saver:
    """Writes a run's checkpoints, one at a time."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder, self._device = folder, processes.device
        self._copies = HostCopies()
        self._peers = _ThreadPeers(processes)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """The last save could not be written; `wait` says why."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """A save is under way."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def save(self, live: Snapshot, then: Callable[[Path], None] | None) -> None:
        """Copy what is in `live` and write it beside whatever follows.

        `then` is called with the checkpoint's path, on the main process only. Raises AgreedError when the save before
        could not be written.
        """
        self.wait()  # its buffers are used again
        copies, ready = self._copies.take({**live.fragments, **live.sampler})
        fragments, sampler = ({name: copies[name] for name in part} for part in (live.fragments, live.sampler))
        snapshot = replace(live, fragments=fragments, sampler=sampler)
        self._thread = threading.Thread(target=self._write, args=(snapshot, ready, then), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last save is on the disk. Raises AgreedError, on all processes, when it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self, seconds: float = 60.0) -> None:
        """Let a save under way end, for so long: the run ends for another reason, which is the one to be told."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, snapshot: Snapshot, ready: torch.cuda.Event | None, then: Callable[[Path], None] | None) -> None:
        try:
            if ready is not None:
                torch.cuda.set_device(self._device)  # a new thread's device is the first one
                ready.synchronize()
            path = write_checkpoint(self._folder, snapshot, self._peers)
            together(self._peers, (lambda: then(path)) if then and self._peers.rank == 0 else None, "export")
        except BaseException as error:  # raised again where the run waits for it
            self._error = error


class HostCopies:
    """Copies of tensors in the host's memory, in buffers that are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The copies by name, and what tells when they are there (None: now). They last until the next call."""
        if self._buffers.keys() != tensors.keys():
            self._buffers = _allocate(tensors)
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if not any(t.is_cuda for t in tensors.values()):
            return dict(self._buffers), None
        ready = torch.cuda.Event()
        ready.record()
        return dict(self._buffers), ready


def _allocate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Host memory for each, page-locked if it is on a GPU.

    In large pieces: torch rounds every page-locked block up to a power of two.
    """
    buffers: dict[str, Tensor] = {}
    left = sum(_padded(t) for t in tensors.values())
    piece, used = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in tensors.items():
        if used + _padded(tensor) > len(piece):
            size = max(_padded(tensor), min(_PIECE, left))
            piece, used = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda), 0
        end = used + tensor.numel() * tensor.element_size()
        buffers[name] = piece[used:end].view(tensor.dtype).view(tensor.shape)
        used, left = used + _padded(tensor), left - _padded(tensor)
    return buffers


def _padded(tensor: Tensor) -> int:
    """Bytes of a tensor, up to the next multiple of the widest element."""
    return -(-tensor.numel() * tensor.element_size() // 8) * 8


class _ThreadPeers:
    """The saving threads of all processes: a group apart from the training's, which works at the same time."""

    def __init__(self, processes: Processes) -> None:
        self.rank = processes.rank
        self._world_size = processes.world_size
        self._group: Any = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT) if processes.world_size > 1 else None

    def gather_objects(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
