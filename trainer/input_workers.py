"""The inputs of the coming steps, made by worker processes where a thread of the training process is too slow.

PyTorch's DataLoader carries them over in shared memory. Each worker makes whole batches of its process's share, every
num_workers-th one; what they are does not depend on who makes them.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import UserError
from trainer.processes import GRACE_SECONDS
from trainer.step_inputs import StepInputs


class Maker(Protocol):
    """Makes the inputs of the step that begins at an image number."""

    def make(self, nimg: int) -> StepInputs: ...


class WorkerSteps:
    """Iterates over `maker.make(start) for start in starts`, in that order, made ahead by processes of their own.

    At most max(prefetch, num_workers) items are made ahead. `wait_seconds` is the time the consumer has spent waiting.

    Raises:
        UserError: what `make` raised, where its item would have come; or a worker died.
    """

    def __init__(
        self, open_maker: Callable[[], Maker], starts: Sequence[int], *, num_workers: int, prefetch: int, pin: bool
    ) -> None:
        self.wait_seconds = 0.0
        self._num_workers = num_workers
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*worker processes in total")  # the user's number stands
            loader = DataLoader(
                _Steps(open_maker), batch_size=None, sampler=starts, num_workers=num_workers, pin_memory=pin,
                prefetch_factor=math.ceil(prefetch / num_workers), worker_init_fn=_leave_signals_to_the_parent,
                multiprocessing_context="spawn",  # a fork would inherit the run's locks, sockets and device
            )  # fmt: skip
            self._items: Any = iter(loader)

    def __iter__(self) -> Iterator[StepInputs]:
        return self

    def __next__(self) -> StepInputs:
        began = time.perf_counter()
        if self._items is None:
            raise StopIteration
        try:
            item: StepInputs | UserError = next(self._items)
        except RuntimeError as error:
            raise UserError(
                f"a data worker died: {error} With data.num_workers={self._num_workers} each holds some batches in "
                "shared memory (/dev/shm; docker run --shm-size): give it more, or take fewer workers."
            ) from None
        finally:
            self.wait_seconds += time.perf_counter() - began
        if isinstance(item, UserError):
            raise item
        return item

    def close(self) -> None:
        """End the workers. May be called again."""
        items, self._items = self._items, None
        if items is not None:
            # DataLoader itself waits until nothing holds its iterator; the traceback of an error does.
            items._shutdown_workers()
            for worker in items._workers:
                worker.kill()  # one that is stuck

    def __enter__(self) -> WorkerSteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps(Dataset[StepInputs | UserError]):
    """What DataLoader knows as a data set: item number n is the inputs of the step that begins at image n."""

    def __init__(self, open_maker: Callable[[], Maker]) -> None:
        self._open_maker = open_maker
        self._maker: Maker | None = None  # opened in the worker

    def __getitem__(self, nimg: int) -> StepInputs | UserError:
        try:
            self._maker = self._maker or self._open_maker()
            return self._maker.make(nimg)
        except UserError as error:
            return error  # DataLoader would wrap it into a traceback


def _leave_signals_to_the_parent(_: int) -> None:
    """A stop request reaches the whole group of processes; the parent still needs batches until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(math.ceil(GRACE_SECONDS)))  # it has no longer than that
