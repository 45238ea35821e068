"""`prepare`: complete or absent, whatever happens to it; done at once when there is nothing to do."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline import prepare as prepare_module
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError, run_cli
from data_pipeline.prepare import main
from data_pipeline.workspace import workspace

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--size", "8", "--num-train", "30", "--num-test", "10"]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_endless(out: Path) -> subprocess.Popen[str]:
    """A `prepare` in a process of its own that would take minutes, once it has written its first shard."""
    command = [sys.executable, "-m", "data_pipeline.prepare", "generated", "--out", str(out), "--shard-mb", "0.1"]
    # A shell's background job ignores SIGINT, and so would its children: these tests may be run in one.
    process = subprocess.Popen(
        [*command, "--num-train", "1000000"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".*/result/train/shard-000001.tar")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_asked_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generated", "--out", str(tmp_path / "out"), *SMALL]
    assert main(arguments) == 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert entries(tmp_path) == ["out"]


def test_other_data_in_the_way_is_kept(tmp_path: Path) -> None:
    main(["generated", "--out", str(tmp_path / "out"), *SMALL])
    with pytest.raises(DataError, match=r"already holds other data.*'seed': 0.*asked for.*'seed': 1"):
        main(["generated", "--out", str(tmp_path / "out"), *SMALL, "--seed", "1"])
    ShardDataset(tmp_path / "out/train")
    with pytest.raises(DataError, match=r"already holds other data.* as png, asked for .* as npy"):
        main(["generated", "--out", str(tmp_path / "out"), *SMALL, "--encoding", "npy"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"not empty and holds no prepared data"):
        main(["generated", "--out", str(tmp_path / "mine"), *SMALL])
    with pytest.raises(DataError, match=r"is a file"):
        main(["generated", "--out", str(tmp_path / "mine/letter.txt"), *SMALL])
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def test_what_the_workers_noticed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "originals").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"originals/{number}.png")
    monkeypatch.setattr(prepare_module, "_PIECE_IMAGES", 2)
    given = ["--from", str(tmp_path / "originals"), "--size", "16", "--holdout", "0", "--num-processes", "3"]
    main(["folder", "--out", str(tmp_path / "out"), *given])
    assert "train: 6 of the originals that were read are smaller than 16 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["train/shard-000000.tar", "test/manifest.json"])
def test_damaged_data_is_named(tmp_path: Path, lost: str) -> None:
    arguments = ["generated", "--out", str(tmp_path / "out"), *SMALL]
    main(arguments)
    (tmp_path / "out" / lost).unlink()
    with pytest.raises(DataError, match=rf"out/{lost.partition('/')[0]}.* is missing\. Remove .*out and"):
        main(arguments)


def test_what_another_command_has_done_is_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_endless(out)
    process.kill()
    process.communicate()  # its workers hold the other end of this pipe: so they are gone
    assert not out.exists()
    assert entries(tmp_path)
    with pytest.raises(DataError, match=r"holds what another command has done so far .* rm -r .*\.out\.preparing"):
        main(["generated", "--out", str(out), *SMALL])
    assert entries(tmp_path / ".out.preparing" / "journal" / "train")
    shutil.rmtree(tmp_path / ".out.preparing")
    assert main(["generated", "--out", str(out), *SMALL]) == 0
    assert entries(tmp_path) == ["out"]
    assert len(ShardDataset(out / "train")) == 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_keeps_what_is_complete(tmp_path: Path, number: signal.Signals) -> None:
    process = start_endless(tmp_path / "out")
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.endswith("error: interrupted.\n")
    assert "Traceback" not in told
    assert entries(tmp_path) == [".out.preparing"]
    assert entries(tmp_path / ".out.preparing") == ["journal", "request", "result"]
    assert not list(tmp_path.rglob("*.part"))


def test_two_at_once_are_kept_apart(tmp_path: Path) -> None:
    with workspace(tmp_path / "out"), pytest.raises(DataError, match=r"another process is preparing .*out right now"):
        main(["generated", "--out", str(tmp_path / "out"), *SMALL])
    assert entries(tmp_path) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/data")
    for _ in range(2):
        assert main(["generated", "--out", str(tmp_path / "out"), *SMALL]) == 0
    assert (tmp_path / "out").is_symlink()
    assert entries(tmp_path) == ["disk", "out"]
    assert entries(tmp_path / "disk") == ["data"]


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(DataError, match=r"out is a mount point, .* Name a folder inside it: .*out/data"):
        main(["generated", "--out", str(tmp_path / "out"), *SMALL])
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1"])
def test_shards_have_a_size(tmp_path: Path, size: str) -> None:
    with pytest.raises(DataError, match=rf"--shard-mb is {float(size)}; it must be a positive number"):
        main(["generated", "--out", str(tmp_path / "out"), *SMALL, "--shard-mb", size])


def test_progress_goes_by_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large original takes a tenth of a second: hundreds of them at a time would be told of once in a minute."""
    told: list[int] = []
    bar = prepare_module.progress_bar

    def watched(*given: Any, **named: Any) -> Any:
        made = bar(*given, **named)
        made.update = told.append
        return made

    monkeypatch.setattr(prepare_module, "progress_bar", watched)
    main(["generated", "--out", str(tmp_path / "out"), "--size", "8", "--num-train", "100", "--num-test", "10"])
    assert told == [32, 32, 32, 4, 10]


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with workspace(out) as work:
        (work.result / "ours").touch()
        out.mkdir()
        (out / "theirs").touch()
        with pytest.raises(DataError, match=r"out has appeared while it was being prepared"):
            work.publish()
    assert entries(out) == ["theirs"]


def test_lock_that_was_just_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder may end between our opening and our locking: that file would lock nobody else out."""
    lock = tmp_path / ".out.lock"
    real = fcntl.flock
    calls: list[int] = []

    def late(fd: int, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with workspace(tmp_path / "out"):
        assert lock.exists()
    assert len(calls) == 2


def test_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(["generated", "--out", str(tmp_path / "out"), *SMALL]))
    assert stop.value.code == 8
    assert "error: the disk is full while writing" in (told := capsys.readouterr().err)
    assert "Traceback" not in told
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--size", "2", 4),
        ("--num-train", "0", 1),
        ("--num-classes", "-1", 0),
        ("--num-processes", "0", 1),
        ("--max-unreadable", "-1", 0),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, option: str, value: str, least: int) -> None:
    with pytest.raises(DataError, match=f"{option} is {value}; it must be at least {least}"):
        main(["generated", "--out", str(tmp_path / "out"), option, value])
    assert entries(tmp_path) == []
