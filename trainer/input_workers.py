"""The inputs of the coming steps, made by worker processes where a thread of the training process is too slow.

PyTorch's DataLoader carries them over in shared memory. Each worker makes whole batches of its process's share, every
num_workers-th one; what they are does not depend on who makes them.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import UserError
from trainer.exits import WorkerDiedError
from trainer.step_inputs import StepInputs


class Maker(Protocol):
    """Makes the inputs of the step that begins at an image number."""

    def make(self, nimg: int) -> StepInputs: ...


class WorkerSteps:
    """Iterates over `maker.make(start) for start in starts`, in that order, made ahead by processes of their own.

    At most max(prefetch, num_workers) items are made ahead. `wait_seconds` is the time the consumer has spent waiting.

    Raises:
        UserError, OSError: what `make` raised, where its item would have come.
        WorkerDiedError: a worker died.
    """

    def __init__(
        self, open_maker: Callable[[], Maker], starts: Sequence[int], *, num_workers: int, prefetch: int, pin: bool
    ) -> None:
        self.wait_seconds = 0.0
        self._num_workers = num_workers
        # DataLoader has a dead worker raise wherever the main thread is, in a save even; `next` finds it as well.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*worker processes in total")  # the user's number stands
            loader = DataLoader(
                _Steps(open_maker), batch_size=None, sampler=starts, num_workers=num_workers, pin_memory=pin,
                prefetch_factor=math.ceil(prefetch / num_workers), worker_init_fn=_live_and_die_with_the_parent,
                multiprocessing_context="spawn",  # a fork would inherit the run's locks, sockets and device
            )  # fmt: skip
            self._items: Any = iter(loader)
        if is_main:
            signal.signal(signal.SIGCHLD, before)
        atexit.register(self.close)  # multiprocessing would wait for the workers at exit

    def __iter__(self) -> Iterator[StepInputs]:
        return self

    def __next__(self) -> StepInputs:
        began = time.perf_counter()
        if self._items is None:
            raise StopIteration
        try:
            item: StepInputs | UserError | OSError = next(self._items)
        except RuntimeError as error:
            raise WorkerDiedError(
                f"a data worker died: {error}. With data.num_workers={self._num_workers} each holds some batches in "
                "shared memory (/dev/shm; docker run --shm-size): give it more, or take fewer workers."
            ) from None
        finally:
            self.wait_seconds += time.perf_counter() - began
        if isinstance(item, UserError | OSError):
            raise item
        return item

    def close(self) -> None:
        """End the workers. May be called again."""
        atexit.unregister(self.close)
        items, self._items = self._items, None
        if items is not None:
            for worker in items._workers:
                worker.kill()  # it may be waiting for a server
            # DataLoader itself would wait until nothing holds its iterator; the traceback of an error does.
            items._shutdown_workers()

    def __enter__(self) -> WorkerSteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps(Dataset[StepInputs | UserError | OSError]):
    """What DataLoader knows as a data set: item number n is the inputs of the step that begins at image n."""

    def __init__(self, open_maker: Callable[[], Maker]) -> None:
        self._open_maker = open_maker
        self._maker: Maker | None = None  # opened in the worker

    def __getitem__(self, nimg: int) -> StepInputs | UserError | OSError:
        try:
            self._maker = self._maker or self._open_maker()
            return self._maker.make(nimg)
        except (UserError, OSError) as error:
            return error  # DataLoader would make a traceback of it, and lose the file's name


def _live_and_die_with_the_parent(_: int) -> None:
    """A stop request reaches the whole group of processes: the parent, which may still need batches, ends us."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns at once if it died while we were starting
    os._exit(1)
