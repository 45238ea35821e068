"""The cache of remote shards: fetched once, bounded, and sound whoever is killed when."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pickle
import random
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Get, HttpFiles, serve_http

from data_pipeline import shard_cache, storage
from data_pipeline.errors import DataError
from data_pipeline.manifest import Shard
from data_pipeline.shard_cache import CacheSettings, ShardCache
from data_pipeline.storage import Storage

SIZE = 100_000  # bytes of a shard
NUM_SHARDS = 8
CONTENTS = [np.random.default_rng(number).bytes(SIZE) for number in range(NUM_SHARDS)]
SHARDS = [
    Shard(file=f"{number}.tar", num_samples=1, num_bytes=SIZE, sha256=hashlib.sha256(content).hexdigest())
    for number, content in enumerate(CONTENTS)
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_FIRST_DELAY", 0.02)
    monkeypatch.setattr(shard_cache, "_POLL", 0.01)


@pytest.fixture
def server() -> Iterator[HttpFiles]:
    with serve_http({shard.file: content for shard, content in zip(SHARDS, CONTENTS, strict=True)}) as running:
        yield running


@pytest.fixture
def new_cache(server: HttpFiles, tmp_path: Path) -> Iterator[Callable[..., ShardCache]]:
    """Makes caches of one folder; `patience` in seconds."""
    made = []

    def make(patience: float = 20.0, **settings: Any) -> ShardCache:
        cache = ShardCache(Storage(server.url, patience=patience), CacheSettings(tmp_path / "cache", **settings))
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


def content_of(fd: int) -> bytes:
    try:
        return os.pread(fd, SIZE + 1, 0)
    finally:
        os.close(fd)


def kept(cache: ShardCache) -> set[int]:
    return {number for number, shard in enumerate(SHARDS) if cache.path(shard).exists()}


def num_gets(server: HttpFiles) -> int:
    return sum(count for (method, _), count in server.requests.items() if method == "GET")


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; gives its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_shard_is_fetched_once_for_all_that_open_it(server: HttpFiles, new_cache: Callable[..., ShardCache]) -> None:
    cache = new_cache()
    before = threading.active_count()
    fd = cache.open(SHARDS[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    assert content_of(fd) == CONTENTS[0]
    for again in (cache, new_cache(), pickle.loads(pickle.dumps(cache))):
        assert content_of(again.open(SHARDS[0])) == CONTENTS[0]
    assert num_gets(server) == 1
    assert not any(thread.name == "shards" for thread in threading.enumerate())
    assert threading.active_count() <= before + 2  # fsspec's event loop; a connection of the server


def test_a_file_of_the_wrong_size_is_fetched_again(server: HttpFiles, new_cache: Callable[..., ShardCache]) -> None:
    cache = new_cache()
    os.close(cache.open(SHARDS[0]))
    os.truncate(cache.path(SHARDS[0]), SIZE - 1)
    assert content_of(cache.open(SHARDS[0])) == CONTENTS[0]
    assert num_gets(server) == 2


def test_what_was_not_used_for_the_longest_time_goes_first(new_cache: Callable[..., ShardCache]) -> None:
    cache = new_cache(max_bytes=3 * SIZE + 10)
    for number in (0, 1, 2, 0, 3):  # 1 has to go for 3
        os.close(cache.open(SHARDS[number]))
    assert kept(cache) == {0, 2, 3}
    in_use = cache.open(SHARDS[2]), cache.open(SHARDS[0])
    os.close(cache.open(SHARDS[3]))
    os.close(cache.open(SHARDS[4]))
    assert kept(cache) == {0, 2, 4}  # 3 was used last, but is no longer
    fds = [cache.open(SHARDS[number]) for number in (4, 5, 6)]
    assert kept(cache) == {4, 5, 6}
    assert [content_of(fd) for fd in (*in_use, *fds)] == [CONTENTS[number] for number in (2, 0, 4, 5, 6)]


def test_a_shard_larger_than_the_cache_is_told(server: HttpFiles, new_cache: Callable[..., ShardCache]) -> None:
    with pytest.raises(DataError, match=r"0.tar has 100,000 bytes.*may hold 99,999.*data\.remote\.cache_gb"):
        new_cache(max_bytes=SIZE - 1).open(SHARDS[0])
    assert num_gets(server) == 0


def test_threads_and_processes_that_want_the_same_shard_share_one_download(
    server: HttpFiles, new_cache: Callable[..., ShardCache]
) -> None:
    def dawdle(get: Get) -> None:
        get.delay = 0.05

    server.fault = dawdle
    cache, other = new_cache(), new_cache()

    def read() -> None:
        with ThreadPoolExecutor(4) as pool:
            for content in pool.map(lambda one: content_of(one.open(SHARDS[0])), [cache, cache, other, other]):
                assert content == CONTENTS[0]

    pids = [fork(read), fork(read)]
    read()
    assert [exit_code(pid) for pid in pids] == [0, 0]
    assert num_gets(server) == 1
    assert [path.name for path in cache.path(SHARDS[0]).parent.glob("[!.]*")] == [f"{SHARDS[0].sha256}.tar"]


def read_at_random(cache: ShardCache, seed: int, num_reads: int) -> None:
    """Read shards, some of them wished for before; checks their content and the bound of 4 shards."""
    numbers = random.Random(seed).choices(range(NUM_SHARDS), k=num_reads)
    for place, number in enumerate(numbers):
        cache.prefetch([SHARDS[later] for later in numbers[place + 1 : place + 3]])
        assert content_of(cache.open(SHARDS[number])) == CONTENTS[number]
        folder = cache.path(SHARDS[0]).parent
        num_bytes = 0
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    num_bytes += path.stat().st_size
        assert num_bytes <= 4 * SIZE


def test_the_bound_holds_over_processes(new_cache: Callable[..., ShardCache]) -> None:
    cache = new_cache(max_bytes=4 * SIZE, num_connections=2)
    pids = [fork(partial(read_at_random, cache, seed, 40)) for seed in range(3)]
    assert [exit_code(pid) for pid in pids] == [0, 0, 0]


@pytest.mark.prove
def test_processes_killed_at_random_times_on_a_bad_network_harm_nobody(
    server: HttpFiles, new_cache: Callable[..., ShardCache]
) -> None:
    rng = random.Random(0)

    def misbehave(get: Get) -> None:
        kind = rng.randrange(12)
        get.cut_at = rng.randrange(SIZE) if kind == 0 else None
        get.stall_at = rng.randrange(SIZE) if kind == 1 else None
        get.status = 503 if kind == 2 else get.status
        get.delay = 0.01 if kind == 3 else 0.0

    server.fault = misbehave
    cache = new_cache(patience=3.0, max_bytes=4 * SIZE, num_connections=2)
    pids = [fork(partial(read_at_random, cache, seed, 10**9)) for seed in range(3)]
    for kill in range(150):
        time.sleep(rng.uniform(0.0, 0.2))
        victim = rng.randrange(3)
        os.kill(pids[victim], signal.SIGKILL)
        assert exit_code(pids[victim]) == -signal.SIGKILL  # until then its checks held
        pids[victim] = fork(partial(read_at_random, cache, 3 + kill, 10**9))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
    server.fault = lambda get: None
    read_at_random(cache, 0, 50)
    wait_until(lambda: not list(cache.path(SHARDS[0]).parent.glob("*.part")))


def test_a_process_killed_in_mid_download_leaves_nothing(
    server: HttpFiles, new_cache: Callable[..., ShardCache]
) -> None:
    def stall(get: Get) -> None:
        get.stall_at = SIZE // 2 if get.number == 1 else None

    server.fault = stall
    cache = new_cache(max_bytes=3 * SIZE)
    children, parents = os.pipe()

    def fetch_two() -> None:
        threading.Thread(target=cache.open, args=(SHARDS[1],), daemon=True).start()
        threading.Thread(target=cache.open, args=(SHARDS[0],), daemon=True).start()
        wait_until(lambda: len(server_parts()) == 2 and all(part.stat().st_size for part in server_parts()))
        # A worker of the killed process outlives it, and knows its descriptors.
        os.write(parents, str(fork(lambda: time.sleep(60))).encode())
        time.sleep(60)

    def server_parts() -> list[Path]:
        return list(cache.path(SHARDS[0]).parent.glob("*.part"))

    pid = fork(fetch_two)
    worker = int(os.read(children, 20))
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    assert len(server_parts()) == 2
    server.fault = lambda get: None
    assert content_of(cache.open(SHARDS[0])) == CONTENTS[0]  # whose part is taken over
    assert server_parts() == []  # and the other one's removed
    for number in (2, 3):
        os.close(cache.open(SHARDS[number]))
    assert kept(cache) == {0, 2, 3}  # it takes no room
    os.kill(worker, signal.SIGKILL)


def test_a_process_that_is_stopped_is_not_waited_for_for_ever(
    server: HttpFiles, new_cache: Callable[..., ShardCache]
) -> None:
    server.fault = lambda get: setattr(get, "stall_at", 0)
    cache = new_cache(patience=0.3)
    pid = fork(lambda: cache.open(SHARDS[0]))
    wait_until(lambda: num_gets(server))
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"another process is fetching .*/0.tar and has got nothing for 0.6 s"):
        cache.open(SHARDS[0])
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)


def test_prefetching_keeps_the_order_the_bound_and_the_last_wish(
    server: HttpFiles, new_cache: Callable[..., ShardCache]
) -> None:
    release = threading.Event()
    server.fault = lambda get: [release.wait(20)].clear()
    cache = new_cache(max_bytes=9 * SIZE, num_connections=1)
    cache.prefetch([SHARDS[number] for number in (5, 1, 2)])
    wait_until(lambda: server.requests)
    cache.prefetch([SHARDS[number] for number in (7, 5, 4, 3, 6, 0)])  # 5 is begun, 1 and 2 are forgotten
    release.set()
    wait_until(lambda: kept(cache) == {5, 7, 4, 3})  # half of the bound
    time.sleep(0.05)
    assert [name for _, name in server.requests] == ["5.tar", "7.tar", "4.tar", "3.tar"]
    assert num_gets(server) == 4
    assert content_of(cache.open(SHARDS[7])) == CONTENTS[7]
    cache.prefetch([SHARDS[0]])
    wait_until(lambda: 0 in kept(cache))
    cache.close()
    wait_until(lambda: not any(thread.name == "shards" for thread in threading.enumerate()))


def test_prefetching_goes_on_in_a_forked_process(server: HttpFiles, new_cache: Callable[..., ShardCache]) -> None:
    cache = new_cache()
    cache.prefetch(SHARDS[:1])
    wait_until(lambda: kept(cache) == {0})

    def work() -> None:
        cache.prefetch(SHARDS[1:3])
        wait_until(lambda: kept(cache) == {0, 1, 2})
        assert content_of(cache.open(SHARDS[3])) == CONTENTS[3]

    assert exit_code(fork(work)) == 0
    assert num_gets(server) == 4


def test_what_goes_wrong_ahead_is_told_by_open(server: HttpFiles, new_cache: Callable[..., ShardCache]) -> None:
    del server.files["0.tar"]
    cache = new_cache()
    cache.prefetch(SHARDS[:2])
    wait_until(lambda: kept(cache) == {1})  # goes on with the next one
    with pytest.raises(DataError, match=r"/0.tar cannot be read: .*HTTP 404"):
        cache.open(SHARDS[0])
    assert list(cache.path(SHARDS[0]).parent.glob("*.part")) == []
    server.files["0.tar"] = CONTENTS[0]
    assert content_of(cache.open(SHARDS[0])) == CONTENTS[0]


def test_a_full_disk_is_named_and_leaves_nothing(
    new_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Storage, "download", fill)
    cache = new_cache()
    with pytest.raises(OSError, match="No space") as caught:
        cache.open(SHARDS[0])
    assert caught.value.filename == str(cache.path(SHARDS[0]).with_suffix(".part"))
    assert [path.name for path in cache.path(SHARDS[0]).parent.iterdir()] == [".lock"]


def test_a_part_that_its_holder_removed_before_our_lock_is_not_filled(
    server: HttpFiles, new_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache()
    part = cache.path(SHARDS[0]).with_suffix(".part")
    try_lock = shard_cache._try_lock
    holders = [part]

    def lock_late(fd: int) -> bool:
        while holders:
            holders.pop().unlink()
        return try_lock(fd)

    monkeypatch.setattr(shard_cache, "_try_lock", lock_late)
    assert content_of(cache.open(SHARDS[0])) == CONTENTS[0]
    assert num_gets(server) == 1


def test_processes_lose_their_patience_together(server: HttpFiles, new_cache: Callable[..., ShardCache]) -> None:
    server.fault = lambda get: setattr(get, "stall_at", 0)
    cache = new_cache(patience=0.6)
    pid = fork(lambda: cache.open(SHARDS[0]))
    wait_until(lambda: num_gets(server))  # it is the other process that tries
    with pytest.raises(DataError, match=r"/0\.tar cannot be read: nothing new came in .* and \d+ attempts") as told:
        cache.open(SHARDS[0])
    exit_code(pid)
    attempts = re.search(r"(\d+) attempts", str(told.value))
    assert attempts is not None
    assert num_gets(server) == int(attempts[1])  # all of them the other's
    server.fault = lambda get: None
    assert content_of(cache.open(SHARDS[0])) == CONTENTS[0]  # who comes later tries for itself
    assert [path.suffix for path in cache.path(SHARDS[0]).parent.iterdir() if path.suffix] == [".tar"]
