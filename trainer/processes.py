"""The processes of a run: who am I, on which device, with whom, and when must I stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import AgreedError
from trainer.exits import BusyError, Exit, failure
from trainer.ports import free_port

GRACE_SECONDS = 25.0  # from a stop request to the end of a process that neither comes to the end of a step nor saves
NOW_SECONDS = 5.0  # from the Ctrl-C that means now to the end
_MEETING_TIMEOUT = timedelta(minutes=30)  # for all processes to start
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place; no host synchronisation on a GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather_flat(self, tensor: Tensor) -> Tensor:
        """[n] of every process -> [world_size * n], in order of rank."""
        if self.world_size == 1:
            return tensor
        out = tensor.new_empty(self.world_size * len(tensor))
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out

    def gather_objects(self, value: T) -> list[T]:
        """Every process's value, on every process, in order of rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """The main process computes a value, all get it.

        What goes wrong there is raised everywhere, as an AgreedError with the exit code of what it was.
        """
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except Exception as error:  # whatever it is, the others must not wait for ever
                box[1] = failure(error)
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise AgreedError(*box[1])
        value: T = box[0]
        return value


def start_processes(*, num_cpu_threads: int | None, hang_seconds: float = 1800.0) -> Processes:
    """Join the other processes, as told by torch's environment variables; without them, be the only one.

    Collective operations may wait for longer than `hang_seconds` (0: for a day), so that it is the watchdog that ends
    and names a hang. Raises BusyError when the meeting port is taken.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
        )  # fmt: skip
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(num_cpu_threads or _share_of_cores())
    _init_process_group(device)
    _set_timeouts(collective_timeout(hang_seconds))
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _init_process_group(device: torch.device) -> None:
    deepspeed = _import_deepspeed()  # heavy; imported here so that `--help` and config errors are instant
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce here that only its inference engine calls: a minute at
        # the first start, and a lock left behind for ever where that start is killed. Say that no op can be built.
        deepspeed.ops.__compatible_ops__ = {}
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=_MEETING_TIMEOUT, verbose=False
        )
    except (RuntimeError, dist.DistNetworkError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise BusyError(
                f"port {os.environ.get('MASTER_PORT')} is in use on {os.environ.get('MASTER_ADDR')}; "
                "give this job another: deepspeed --master_port PORT (or MASTER_PORT=PORT for torchrun and others)."
            ) from None
        raise


def _import_deepspeed() -> Any:
    """Its autotuner, which nobody calls here, would import mlflow: a third of what a process takes to start."""
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    return deepspeed


def collective_timeout(hang_seconds: float) -> timedelta:
    """How long a collective operation may wait: ten minutes longer than the watchdog does."""
    return timedelta(seconds=max(1800.0, hang_seconds + 600.0)) if hang_seconds else timedelta(days=1)


def _set_timeouts(timeout: timedelta) -> None:
    """Of the group of all processes, and of groups yet to be made: DeepSpeed makes its own and leaves them torch's
    default (with NCCL ten minutes), which nothing public changes.
    """
    dist.distributed_c10d._set_pg_timeout(timeout)
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout


def _share_of_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))


class StopAgreement:
    """Lets all processes leave the loop at the same step, when any of them was asked to.

    The question goes round in the background after every step, between hosts' memories, and its answer is read a
    step later: nothing waits, neither for it nor for a GPU.
    """

    def __init__(self, processes: Processes) -> None:
        self._group = dist.new_group(backend="gloo") if processes.world_size > 1 else None
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def after_step(self, requested: bool) -> bool:
        """Called by all processes after every step; True on all of them at the same step."""
        if self._group is None:
            return requested
        if self._pending is not None:
            self._pending.wait()
            if int(self._votes) > 0:
                return True
        self._votes = torch.tensor([int(requested)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._votes, group=self._group, async_op=True)
        return False


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C, and when the launcher that started us has died.

    The loop reads it at a step boundary, saves and exits. Should the process be stuck, it is ended after
    `GRACE_SECONDS` anyway, so that no orphan keeps a device. While a save is under way (the loop's last one,
    `saving`, or an earlier one, `busy`) it may take its time.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self.saving = False
        self.busy: Callable[[], bool] = lambda: False
        self._interruptible = False

    def install(self, *, launched: bool) -> None:
        """Listen; `launched`: a launcher (deepspeed, torchrun, Ray) started us, so its death ends us too."""
        # Python calls a handler only between two instructions of the main thread, which may wait for a peer in a
        # collective operation. The number also goes into a pipe, at once; a thread reads it there.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        if launched:
            threading.Thread(target=self._watch_launcher, args=(os.getppid(),), daemon=True).start()

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._interruptible and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self._interruptible = True

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number == signal.SIGINT and self.requested:
                    _end_soon(Exit.INTERRUPTED)
                elif number in _SIGNALS:
                    self._request(f"received {signal.Signals(number).name}")

    def _request(self, reason: str) -> None:
        if not self.requested:
            self.reason = reason
            self.requested = True
            threading.Thread(target=self._force, daemon=True).start()

    def _watch_launcher(self, parent: int) -> None:
        # `deepspeed` starts another process that starts us, and hands on no signal: its death must reach us too.
        grandparent = _parent_of(parent) if "deepspeed.launcher" in _command_of(parent) else None
        while os.getppid() == parent and (grandparent is None or _parent_of(parent) == grandparent):
            time.sleep(1.0)
        self._request("the launcher died")

    def _force(self) -> None:
        left = GRACE_SECONDS
        while left > 0:
            step = min(1.0, left)
            time.sleep(step)
            left = GRACE_SECONDS if self.saving or self.busy() else left - step
        print(f"{self.reason}, but no step ended within {GRACE_SECONDS:.0f} s: not saved", file=sys.stderr, flush=True)
        os._exit(Exit.LOST)


def _end_soon(code: int) -> None:
    """End even where the main thread does not come to it: it waits in C, or for a save."""
    timer = threading.Timer(NOW_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def _parent_of(pid: int) -> int | None:
    """The parent of another process; None where /proc does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
