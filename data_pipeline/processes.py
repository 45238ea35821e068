"""Work shared out to forked processes; its results come in the order of the tasks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from data_pipeline.errors import DataError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 3  # tasks a process is given before the first of their results is taken
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def available_cpus() -> int:
    """The CPUs that this process may use: a container's or a job's share, not the machine's."""
    return len(os.sched_getaffinity(0))


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    tasks: dict[int, Any] = field(default_factory=dict)  # given and not answered yet, by number


class WorkerPool(Generic[Task, Result]):
    """`work` in `num_processes` forked processes, which inherit all that it refers to; with 1, in this process.

    They end with the pool, and with this process however it ends.
    """

    def __init__(self, work: Callable[[Task], Result], num_processes: int) -> None:
        assert num_processes >= 1
        self._work = work
        self._workers: list[_Worker] = []
        if num_processes > 1:
            # Until a new process has set its own handlers, a signal would run those that it inherited.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                for _ in range(num_processes):
                    self._start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """`work(task)` of every task, in order; a bounded number of tasks is worked on ahead.

        Raises:
            DataError: a process died: names its task and what is known of the reason.
            Exception: what `work` raised, where its result would have come; from another process anything but a
                UserError or OSError comes as a RuntimeError with the traceback in its text.
        """
        if not self._workers:
            yield from map(self._work, tasks)
            return
        waiting = enumerate(tasks)
        answers: dict[int, bytes] = {}  # that came before their turn
        num_given = self._give(islice(waiting, _AHEAD * len(self._workers)))
        number = 0
        while number < num_given:
            while number not in answers:
                self._receive(answers)
            result, error = pickle.loads(answers.pop(number))
            if error is not None:
                raise error
            num_given += self._give(islice(waiting, 1))
            number += 1
            yield result

    def close(self) -> None:
        """End the processes at once, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=self._serve, args=(theirs, ours), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))

    def _serve(self, connection: Connection, other_end: Connection) -> None:
        """The life of a worker: ends when nobody holds the other end of its connection any more."""
        for inherited in (other_end, *(worker.connection for worker in self._workers)):
            inherited.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; our parent ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        gc.freeze()  # or each collection would write to, and so copy, all memory that we share with the parent
        with ThreadPoolExecutor(1) as sender:  # a pipe is soon full: go on working while the parent is busy
            while True:
                try:
                    number, task = connection.recv()
                except (EOFError, ConnectionResetError):
                    return
                sender.submit(connection.send, (number, _answer(self._work, task)))

    def _give(self, numbered: Iterable[tuple[int, Task]]) -> int:
        """Send tasks to the processes that have the fewest; returns how many."""
        count = 0
        for number, task in numbered:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            worker.tasks[number] = task
            try:
                worker.connection.send((number, task))
            except (BrokenPipeError, ConnectionResetError):
                raise _died(worker) from None
            count += 1
        return count

    def _receive(self, answers: dict[int, bytes]) -> None:
        """Wait for at least one answer."""
        ready = wait([worker.connection for worker in self._workers])
        for worker in self._workers:
            if worker.connection not in ready:
                continue
            try:
                number, answer = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                raise _died(worker) from None
            del worker.tasks[number]
            answers[number] = answer


def _answer(work: Callable[[Any], Any], task: Any) -> bytes:
    """The pickled pair (result, error), one of which is None."""
    try:
        return pickle.dumps((work(task), None))
    except (UserError, OSError) as error:
        return pickle.dumps((None, error))
    except Exception as error:
        return pickle.dumps((None, RuntimeError(f"{error!r} in a worker process:\n{traceback.format_exc()}")))


def _died(worker: _Worker) -> DataError:
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    tasks = " or ".join(map(str, worker.tasks.values())) or "nothing"  # it may have done the first ones
    why = " Most likely the memory ran out: try fewer processes (--num-processes)." if code == -signal.SIGKILL else ""
    return DataError(f"a worker process {how} while it was working on {tasks}.{why}")
