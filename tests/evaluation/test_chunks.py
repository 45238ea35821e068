"""Chunks: the same bits from any number of processes, in any order, after any interruption."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from evaluation.chunks import Advance, Arrays, Chunks, FinishedElsewhere, Shard, concatenated, cut, shard_of

NUM = 7


class Job:
    """Chunks that say who was made, and stop where they are told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made: list[int] = []
        self.fail_at = fail_at

    def __call__(self, number: int, advance: Advance) -> Arrays:
        if number == self.fail_at:
            raise KeyboardInterrupt
        self.made.append(number)
        advance(1)
        return {"x": np.random.default_rng(number).random(number + 1)}


def run(chunks: Chunks, job: Job, **options: bool) -> np.ndarray:
    return concatenated(chunks.results("part", NUM, job, **options))["x"]


@pytest.fixture
def expected() -> np.ndarray:
    return run(Chunks(), Job())


def test_in_memory_one_is_made_at_a_time() -> None:
    job = Job()
    results = Chunks().results("part", NUM, job)
    next(results)
    assert job.made == [0]


def test_an_interrupted_job_goes_on(tmp_path: Path, expected: np.ndarray) -> None:
    first, second = Job(fail_at=4), Job()
    with pytest.raises(KeyboardInterrupt):
        run(Chunks(tmp_path), first)
    assert np.array_equal(run(Chunks(tmp_path), second), expected)
    assert (first.made, second.made) == ([0, 1, 2, 3], [4, 5, 6])
    third = Job()
    assert np.array_equal(run(Chunks(tmp_path), third), expected)
    assert third.made == []


def test_a_damaged_chunk_is_made_again(tmp_path: Path, expected: np.ndarray) -> None:
    run(Chunks(tmp_path), Job())
    path = tmp_path / "part" / "000002.npz"
    path.write_bytes(path.read_bytes()[:40])
    job = Job()
    assert np.array_equal(run(Chunks(tmp_path), job), expected)
    assert job.made == [2]


def test_any_damage_is_a_chunk_that_is_not_there(tmp_path: Path, expected: np.ndarray) -> None:
    run(Chunks(tmp_path), Job())
    path = tmp_path / "part" / "000002.npz"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):  # the archive's directory among them
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        assert np.array_equal(run(Chunks(tmp_path), Job()), expected), position


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_work(tmp_path: Path, expected: np.ndarray, count: int) -> None:
    jobs = [Job() for _ in range(count)]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        found[index] = run(Chunks(tmp_path, shard=Shard(index, count)), jobs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [job.made for job in jobs] == [list(range(index, NUM, count)) for index in range(count)]
    assert all(np.array_equal(found[index], expected) for index in range(count))


def test_what_others_never_bring_is_made_here(
    tmp_path: Path, expected: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job()
    assert np.array_equal(run(Chunks(tmp_path, shard=Shard(1, 2), patience=0.3), job), expected)
    assert job.made == [1, 3, 5, 0, 2, 4, 6]
    assert "part 0 of 2 has brought nothing" in capsys.readouterr().out


def test_only_the_first_waits_for_the_last_chunks(tmp_path: Path, expected: np.ndarray) -> None:
    job = Job()
    with pytest.raises(FinishedElsewhere):
        run(Chunks(tmp_path, shard=Shard(1, 2)), job, final=True)
    assert job.made == [1, 3, 5]
    assert np.array_equal(run(Chunks(tmp_path, shard=Shard(0, 2)), Job(), final=True), expected)


def test_nobody_works_for_a_job_that_is_done(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    job = Job()
    chunks = Chunks(tmp_path / "chunks", shard=Shard(1, 2), result=result, patience=1e9)
    results: Iterator[Arrays] = chunks.results("part", NUM, job)
    result.touch()
    with pytest.raises(FinishedElsewhere):
        next(results)
    assert job.made == []
    result.unlink()

    def finish_when_it_waits() -> None:
        while len(job.made) < 3:
            time.sleep(0.01)
        time.sleep(0.5)
        result.touch()

    threading.Thread(target=finish_when_it_waits, daemon=True).start()
    with pytest.raises(FinishedElsewhere):
        run(chunks, job)
    assert job.made == [1, 3, 5]


def test_a_chunk_that_comes_after_the_result_is_not_left_behind(tmp_path: Path) -> None:
    result = tmp_path / "result.json"

    class Late(Job):
        def __call__(self, number: int, advance: Advance) -> Arrays:
            result.touch()
            return super().__call__(number, advance)

    with pytest.raises(FinishedElsewhere):
        run(Chunks(tmp_path / "chunks", result=result), Late())
    assert not (tmp_path / "chunks").exists()


def test_removing(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "chunks")
    run(chunks, Job())
    chunks.remove()
    assert not (tmp_path / "chunks").exists()


def test_cutting() -> None:
    assert cut(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert cut(0, 2) == []


def test_who_am_i(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert shard_of(None) == Shard(0, 1)
    assert shard_of("1/3") == Shard(1, 3)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of(None) == Shard(2, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK=2 and WORLD_SIZE=2"):
        shard_of(None)
    for wrong in ("3/3", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(UserError, match="--shard"):
            shard_of(wrong)
