"""Reading from real servers that drop, truncate, stall, refuse and lie: the right bytes, or a clear error in time."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import PIECE, Get, HttpFiles, Proxy, proxy_to, serve_http, serve_s3

from data_pipeline import storage as storage_module
from data_pipeline.errors import DataError
from data_pipeline.storage import Storage, is_url

CONTENT = np.random.default_rng(0).bytes(300_000)
QUICK = 0.3  # seconds of patience where it is to be lost


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_DELAY", 0.02)


@pytest.fixture
def server() -> Iterator[HttpFiles]:
    with serve_http({"a.tar": CONTENT}) as running:
        yield running


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def download(storage: Storage, path: Path, *, name: str = "a.tar", expected: bytes = CONTENT) -> bytes:
    with open(path, "wb") as file:
        storage.download(name, file, num_bytes=len(expected), sha256=sha256(expected))
    return path.read_bytes()


@pytest.mark.parametrize("url", ["s3://bucket/a", "gs://b", "http://h/x", "https://h", "memory://x", "file:///tmp"])
def test_urls_are_told_from_paths(url: str) -> None:
    assert is_url(url)
    for path in ("data/cifar10", "/data/x", "C://x", "s3:/x", Path("data"), "./a://b"):
        assert not is_url(path)


def test_a_file_is_downloaded_and_read(server: HttpFiles, tmp_path: Path) -> None:
    storage = Storage(server.url + "/")
    assert download(storage, tmp_path / "a") == CONTENT
    assert storage.read("a.tar") == CONTENT
    assert server.requests == {("GET", "a.tar"): 2}


def test_every_file_is_asked_for_its_size_over_http(server: HttpFiles) -> None:
    names = [f"{number}.tar" for number in range(300)]
    server.files = {name: b"x" * number for number, name in enumerate(names) if number != 7}
    assert Storage(server.url).sizes(names) == {name: None if name == "7.tar" else n for n, name in enumerate(names)}
    assert set(server.requests.values()) == {1}


def test_broken_connections_are_resumed_where_they_broke(server: HttpFiles, tmp_path: Path) -> None:
    def drop(get: Get) -> None:
        get.cut_at = 3 * PIECE + 5 if get.number < 4 else None

    server.fault = drop
    assert download(Storage(server.url), tmp_path / "a") == CONTENT
    assert server.starts == [0, 3 * PIECE + 5, 2 * (3 * PIECE + 5), 3 * (3 * PIECE + 5)]
    assert server.num_bytes_sent == len(CONTENT)


def test_a_server_without_ranges_is_read_from_the_beginning_again(server: HttpFiles, tmp_path: Path) -> None:
    def drop(get: Get) -> None:
        get.cut_at = get.number * 5 * PIECE if get.number < 3 else None

    server.fault, server.has_ranges = drop, False
    assert download(Storage(server.url), tmp_path / "a") == CONTENT
    assert server.requests["GET", "a.tar"] == 3


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_server_errors_are_retried(server: HttpFiles, tmp_path: Path, status: int) -> None:
    def fail(get: Get) -> None:
        get.status = status if get.number < 3 else get.status

    server.fault = fail
    assert download(Storage(server.url), tmp_path / "a") == CONTENT
    assert server.requests["GET", "a.tar"] == 3


def test_a_length_that_is_too_long_or_too_short_is_not_believed(server: HttpFiles, tmp_path: Path) -> None:
    def lie(get: Get) -> None:
        get.length += {1: 1000, 2: -1000}.get(get.number, 0)
        get.cut_at = PIECE if get.number == 1 else None

    server.fault = lie
    assert download(Storage(server.url), tmp_path / "a") == CONTENT
    assert server.starts == [0, PIECE, len(CONTENT) - 1000]


def test_a_stalled_connection_is_given_up_for_another(server: HttpFiles, tmp_path: Path) -> None:
    def stall(get: Get) -> None:
        get.stall_at = PIECE if get.number == 1 else None

    server.fault = stall
    assert download(Storage(server.url, patience=QUICK), tmp_path / "a") == CONTENT
    assert server.starts == [0, PIECE]


def test_a_slow_server_is_waited_for_as_long_as_bytes_come(server: HttpFiles, tmp_path: Path) -> None:
    def dawdle(get: Get) -> None:
        get.delay = 0.1

    server.fault = dawdle
    patience = 1.2  # a third of it is a silence: on a busy machine a delay may be a few times what was asked for
    assert len(CONTENT) / PIECE * 0.1 > 1.5 * patience  # longer than the patience altogether
    assert download(Storage(server.url, patience=patience), tmp_path / "a") == CONTENT
    assert server.requests["GET", "a.tar"] == 1


def stalls(get: Get) -> None:
    get.stall_at = 0


def stops_at_the_same_byte(get: Get) -> None:
    get.cut_at = max(0, 2 * PIECE - get.start)


def fails(get: Get) -> None:
    get.status = 503


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(
    ("fault", "answer"),
    [(stalls, "it stalled"), (stops_at_the_same_byte, "Payload"), (fails, "HTTP 503")],
)
def test_a_server_that_never_delivers_costs_no_more_than_the_patience(
    server: HttpFiles, tmp_path: Path, fault: Any, answer: str, has_ranges: bool
) -> None:
    server.fault, server.has_ranges = fault, has_ranges
    with pytest.raises(DataError, match=answer) as caught:
        download(Storage(server.url, patience=QUICK), tmp_path / "a")
    assert f"{server.url}/a.tar" in str(caught.value)
    assert "data.remote.patience is 0.3" in str(caught.value)
    assert "attempts" in str(caught.value)


def test_a_dead_server_is_told_and_its_files_are_not_called_missing(tmp_path: Path) -> None:
    with serve_http() as server:
        dead = Storage(server.url.replace("//", "//me:secret@"), patience=QUICK)
    for ask in (lambda: dead.sizes(["a.tar"]), lambda: dead.read("a.tar"), lambda: download(dead, tmp_path / "a")):
        with pytest.raises(DataError, match="ClientConnectorError") as caught:
            ask()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [403, 404, 410, 416])
def test_a_refusal_is_told_at_once(server: HttpFiles, tmp_path: Path, status: int) -> None:
    def refuse(get: Get) -> None:
        get.status = status

    server.fault = refuse
    with pytest.raises(DataError, match=f"HTTP {status}"):
        download(Storage(server.url), tmp_path / "a")
    with pytest.raises(DataError, match=f"/a.tar cannot be read.*HTTP {status}"):
        Storage(server.url).read("a.tar")
    assert server.requests["GET", "a.tar"] == 2


def test_damage_on_the_way_is_mended_by_another_download(server: HttpFiles, tmp_path: Path) -> None:
    def flip(get: Get) -> None:
        if get.number < 3:
            get.body = get.body[:999] + b"?" + get.body[1000:]

    server.fault = flip
    assert CONTENT[999:1000] != b"?"
    assert download(Storage(server.url), tmp_path / "a") == CONTENT
    assert server.requests["GET", "a.tar"] == 3


def test_a_file_that_is_always_damaged_is_told_with_both_sums(server: HttpFiles, tmp_path: Path) -> None:
    server.files["a.tar"] = other = CONTENT[::-1]
    with pytest.raises(DataError, match="arrives damaged") as caught:
        download(Storage(server.url), tmp_path / "a")
    assert sha256(CONTENT) in str(caught.value)
    assert sha256(other) in str(caught.value)
    assert server.requests["GET", "a.tar"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_ours_and_not_retried(server: HttpFiles) -> None:
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as file:
        Storage(server.url).download("a.tar", file, num_bytes=len(CONTENT), sha256=sha256(CONTENT))
    assert caught.value.errno == errno.ENOSPC
    assert server.requests["GET", "a.tar"] == 1


def test_configured_headers_are_sent(server: HttpFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer x"}})
    storage = Storage(server.url)
    storage.sizes(["a.tar"])
    server.fault = lambda get: setattr(get, "cut_at", PIECE if get.number == 1 else None)
    download(storage, tmp_path / "a")
    assert [headers.get("Authorization") for headers in server.headers] == ["Bearer x"] * 3


def test_a_protocol_that_is_unknown_or_not_installed_is_told() -> None:
    with pytest.raises(DataError, match="Protocol not known: ss3"):
        Storage("ss3://bucket").read("a")


def test_memory_holds_blocks_and_not_the_file(server: HttpFiles, tmp_path: Path) -> None:
    server.files["a.tar"] = content = bytes(24 << 20)
    download(Storage(server.url), tmp_path / "small", expected=content[: 1 << 20])  # what is imported for good
    tracemalloc.start()
    try:
        with open(tmp_path / "a", "wb") as file:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            Storage(server.url).download("a.tar", file, num_bytes=len(content), sha256=sha256(content))
            assert tracemalloc.get_traced_memory()[1] - before < 6 << 20
    finally:
        tracemalloc.stop()


def test_it_works_in_a_forked_and_in_another_process(server: HttpFiles) -> None:
    storage = Storage(server.url)
    storage.read("a.tar")  # this process has an event loop and connections now
    pid = os.fork()
    if pid == 0:
        os._exit(0 if storage.read("a.tar") == CONTENT else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert pickle.loads(pickle.dumps(storage)).read("a.tar") == CONTENT


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="needs the extra 'remote'")
    pytest.importorskip("moto.server", reason="needs the extra 'dev'")
    with serve_s3() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A bucket `shards` behind a proxy, with the settings that a user would make."""
    import fsspec.config
    import s3fs

    for name, value in [("KEY_ID", "AKIA0"), ("KEY", "x")]:
        monkeypatch.setenv(f"AWS_{'ACCESS' if name == 'KEY_ID' else 'SECRET_ACCESS'}_{name}", value)
    direct = s3fs.S3FileSystem(endpoint_url=s3_endpoint, skip_instance_cache=True)
    if not direct.exists("shards"):
        direct.mkdir("shards")
        direct.pipe_file("shards/train/a.tar", CONTENT)
        direct.pipe_file("shards/train/manifest.json", b"{}")
    monkeypatch.setattr(storage_module, "_BLOCK", 1 << 16)
    with proxy_to(s3_endpoint) as proxy:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
        storage_module._filesystem.cache_clear()
        yield proxy
    storage_module._filesystem.cache_clear()


def test_s3_is_listed_read_and_downloaded(s3: Proxy, tmp_path: Path) -> None:
    storage = Storage("s3://shards/train")
    assert storage.sizes(["a.tar", "manifest.json", "b.tar"]) == {"a.tar": 300_000, "manifest.json": 2, "b.tar": None}
    assert Storage("s3://shards/none").sizes(["a.tar"]) == {"a.tar": None}
    assert storage.read("manifest.json") == b"{}"
    assert download(storage, tmp_path / "a") == CONTENT


def test_s3_that_may_not_be_listed_is_asked_for_every_file(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    async def denied(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3fs.S3FileSystem, "_ls", denied)
    assert Storage("s3://shards/train").sizes(["b.tar", "a.tar"]) == {"b.tar": None, "a.tar": 300_000}


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_s3_connections_that_break_or_stall_are_resumed(s3: Proxy, tmp_path: Path, fault: str) -> None:
    s3.fault, s3.after_bytes, s3.num_faults = fault, 40_000, 8 if fault == "cut" else 2
    assert download(Storage("s3://shards/train", patience=1.5), tmp_path / "a") == CONTENT
    assert s3.num_done == s3.num_faults


def test_s3_damage_is_told(s3: Proxy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="arrives damaged"):
        download(Storage("s3://shards/train"), tmp_path / "a", expected=CONTENT[:-1] + b"!")


def test_s3_refusals_are_told(s3: Proxy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://shards/train/b.tar cannot be read: there is no such file"):
        Storage("s3://shards/train").read("b.tar")
    with pytest.raises(DataError, match=r"there is no such file"):
        download(Storage("s3://no-such-bucket/train"), tmp_path / "a")


def test_s3_that_died_is_told_after_the_patience(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.fault, s3.after_bytes, s3.num_faults = "stall", 1, 1000
    for ask in (lambda storage: storage.sizes(["a.tar"]), lambda storage: storage.read("a.tar")):
        with pytest.raises(DataError, match="it stalled"):
            ask(Storage("s3://shards/train", patience=QUICK))
