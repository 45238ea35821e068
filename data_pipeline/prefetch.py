"""Makes the next items while the consumer works on the present one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `make(start) for start in starts`, in that order, made ahead by background threads.

    At most `depth` items are made ahead of the consumer. An error in `make` is raised where its item would have
    come, and ends the iteration. `wait_seconds` is the time the consumer has spent waiting so far.
    """

    def __init__(self, make: Callable[[int], T], starts: Iterable[int], depth: int = 2, num_threads: int = 1) -> None:
        assert depth >= 1
        assert num_threads >= 1
        self.wait_seconds = 0.0
        self._make = make
        self._starts = iter(starts)
        self._pending: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(num_threads, "prefetch")
        for _ in range(depth):
            self._submit_next()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._pending:
            self.close()
            raise StopIteration
        began = time.perf_counter()
        try:
            item = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - began
        self._submit_next()
        return item

    def close(self) -> None:
        """Stop making items, and wait for the one being made. May be called again."""
        self._starts = iter(())
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_next(self) -> None:
        for start in self._starts:
            self._pending.append(self._pool.submit(self._make, start))
            return
