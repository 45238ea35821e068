"""Work in several processes: in order, bounded, with errors in their place, and no way to hang."""

from __future__ import annotations

import os
import signal
import time

import pytest

from data_pipeline.errors import DataError
from data_pipeline.processes import WorkerPool


def big_square(number: int) -> tuple[int, bytes]:
    time.sleep(0.001 * (number % 3))  # later ones may be ready first
    return number * number, bytes(200_000)  # more than a pipe holds


@pytest.mark.parametrize("num_processes", [1, 3])
def test_results_come_in_order(num_processes: int) -> None:
    with WorkerPool(big_square, num_processes) as pool:
        for _ in range(2):
            assert [square for square, _ in pool.map(range(40))] == [number * number for number in range(40)]


def test_a_bounded_number_of_tasks_is_taken_ahead() -> None:
    taken: list[int] = []

    def tasks() -> object:
        for number in range(1000):
            taken.append(number)
            yield number

    with WorkerPool(big_square, 2) as pool:
        results = pool.map(tasks())
        for consumed in range(1, 10):
            next(results)
            assert len(taken) <= consumed + 6


@pytest.mark.parametrize("num_processes", [1, 2])
def test_user_errors_come_in_their_place(num_processes: int) -> None:
    def work(number: int) -> int:
        if number >= 5:
            raise DataError(f"no {number}")
        return number

    with WorkerPool(work, num_processes) as pool:
        results = pool.map(range(20))
        assert [next(results) for _ in range(5)] == list(range(5))
        with pytest.raises(DataError, match="no 5"):
            next(results)


def test_other_errors_bring_their_traceback() -> None:
    def work(number: int) -> int:
        return 1 // number

    with (
        WorkerPool(work, 2) as pool,
        pytest.raises(RuntimeError, match=r"(?s)ZeroDivision.*worker.*return 1 // number"),
    ):
        list(pool.map([1, 0]))


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL while .* 7.* the memory ran out"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), "killed by SIGUSR1 while .* 7[^M]*$"),
        (lambda: os._exit(3), "ended with code 3 while .* 7[^M]*$"),
    ],
)
def test_death_of_a_process_is_an_error(end: object, told: str) -> None:
    def work(number: int) -> int:
        if number == 7:
            end()
        return number

    with WorkerPool(work, 2) as pool, pytest.raises(DataError, match=told):
        list(pool.map(range(100)))


def test_closing_does_not_wait_for_the_work() -> None:
    def work(number: int) -> int:
        if number == 1:
            time.sleep(1000)
        return number

    with WorkerPool(work, 2) as pool:
        assert next(pool.map(range(10))) == 0


def test_ctrl_c_is_left_to_the_parent() -> None:
    def work(number: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return number

    with WorkerPool(work, 2) as pool:
        assert list(pool.map(range(10))) == list(range(10))
