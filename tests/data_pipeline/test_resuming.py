"""`prepare` stopped at any point goes on behind the last complete shard, and the result is the same to the byte."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import select
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from trees import same_tree

from data_pipeline import prepare as prepare_module
from data_pipeline.errors import DataError
from data_pipeline.prepare import main, prepare
from data_pipeline.sources import imagenet
from data_pipeline.sources.base import UnreadableImageError
from data_pipeline.sources.generated import Generated, GeneratedSplit
from data_pipeline.sources.image_folder import list_images
from data_pipeline.sources.originals import LooseFiles

UNREADABLE = (4, 150, 151, 202)  # the last one behind the last sample of its split


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the images are shared out among several processes."""
    monkeypatch.setattr(prepare_module, "_PIECE_IMAGES", 16)


@pytest.fixture
def damaged_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four training images cannot be read."""
    load = GeneratedSplit.load

    def load_or_fail(self: GeneratedSplit, position: int) -> tuple[NDArray[np.uint8], int]:
        if self.first == 0 and position in UNREADABLE:
            raise UnreadableImageError(f"image-{position}.jpg: cut\noff")
        return load(self, position)

    monkeypatch.setattr(GeneratedSplit, "load", load_or_fail)


def at_fsync(count: int, what: Callable[[], None]) -> None:
    """Do `what` in place of this process's fsync number `count`: each is a step of the writing."""
    real, calls = os.fsync, [0]

    def counted(fd: int) -> None:
        calls[0] += 1
        if calls[0] == count:
            what()
        real(fd)

    os.fsync = counted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run_apart(source: Generated, out: Path, *, stop_at: int, how: Callable[[], None], num_processes: int) -> int:
    """`prepare` in a process of its own, stopped at an fsync; returns its exit code. No process is left behind."""

    def run() -> None:
        os.close(ours)
        at_fsync(stop_at, how)
        try:
            prepare(source, out, shard_mb=0.06, num_processes=num_processes)
        except OSError:
            os._exit(7)

    ours, theirs = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(theirs)
    process.join(30)
    try:
        ready, _, _ = select.select([ours], [], [], 10)
        assert ready  # nobody holds the other end any more: the workers are gone too
    finally:
        os.close(ours)
    assert process.exitcode is not None
    return process.exitcode


def test_killed_again_and_again(small_source: Generated, prepared: Path, tmp_path: Path) -> None:
    """A step later each time, so that every step of a shard and of the end is met."""
    out, kills = tmp_path / "out", 0
    while code := run_apart(small_source, out, stop_at=10 + kills, how=kill, num_processes=1 + kills % 3):
        assert code == -signal.SIGKILL
        assert not out.exists()
        kills += 1
        assert kills < 30
    assert kills > 5
    assert same_tree(prepared, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.prove
def test_killed_at_any_time(small_source: Generated, prepared: Path, tmp_path: Path) -> None:
    points = random.Random(0)
    for _ in range(100):
        out = tmp_path / "out"
        at, among = points.randrange(1, 60), points.randrange(1, 4)
        while run_apart(small_source, out, stop_at=at, how=kill, num_processes=among):
            at = points.randrange(1, 60)
        assert same_tree(prepared, out)
        shutil.rmtree(out)


def test_full_disk_loses_nothing(small_source: Generated, prepared: Path, tmp_path: Path) -> None:
    assert run_apart(small_source, tmp_path / "out", stop_at=18, how=full_disk, num_processes=2) == 7
    noted = sorted(path.name for path in (tmp_path / ".out.preparing/journal/train").glob("*.json"))
    assert noted == ["shard-000000.json", "shard-000001.json"]
    assert not list(tmp_path.rglob("*.part"))
    prepare(small_source, tmp_path / "out", shard_mb=0.06)
    assert same_tree(prepared, tmp_path / "out")


def test_says_where_it_goes_on(small_source: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_apart(small_source, tmp_path / "out", stop_at=18, how=full_disk, num_processes=1)
    capsys.readouterr()
    prepare(small_source, tmp_path / "out", shard_mb=0.06)
    told = capsys.readouterr().out
    assert "going on after 2 shards, 60 images." in told
    assert "train: 203 images in" in told


def test_cut_off_shard_is_made_anew(small_source: Generated, prepared: Path, tmp_path: Path) -> None:
    """As a power failure may leave it."""
    run_apart(small_source, tmp_path / "out", stop_at=25, how=full_disk, num_processes=1)
    os.truncate(tmp_path / ".out.preparing/result/train/shard-000001.tar", 100)
    prepare(small_source, tmp_path / "out", shard_mb=0.06)
    assert same_tree(prepared, tmp_path / "out")


@pytest.mark.parametrize("num_processes", [2, 3])
def test_number_of_processes_changes_nothing(
    small_source: Generated, prepared: Path, tmp_path: Path, num_processes: int
) -> None:
    prepare(small_source, tmp_path / "out", shard_mb=0.06, num_processes=num_processes)
    assert same_tree(prepared, tmp_path / "out")


def test_worker_that_dies_is_told(
    small_source: Generated, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = GeneratedSplit.load

    def die(self: GeneratedSplit, position: int) -> tuple[NDArray[np.uint8], int]:
        if position == 130:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(GeneratedSplit, "load", die)
        with pytest.raises(DataError, match=r"killed by SIGKILL while .* images 128 to 143 of train.*num-processes"):
            prepare(small_source, tmp_path / "out", shard_mb=0.06, num_processes=2)
    assert list((tmp_path / ".out.preparing/result/train").glob("shard-*.tar"))
    prepare(small_source, tmp_path / "out", shard_mb=0.06)
    assert same_tree(prepared, tmp_path / "out")


@pytest.mark.usefixtures("damaged_originals")
def test_unreadable_images_are_listed_and_left_out(
    small_source: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(small_source, tmp_path / "out", shard_mb=0.06, max_unreadable=4)
    told = capsys.readouterr().out
    assert "train: 199 images in" in told
    assert f"4 images could not be read and are left out: see {tmp_path / 'out/unreadable.txt'}" in told
    lines = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert lines == [f"image-{position}.jpg: cut off" for position in UNREADABLE]
    for stop_at in (12, 20, 33):  # the list too is the same after any stop
        run_apart(small_source, tmp_path / "again", stop_at=stop_at, how=full_disk, num_processes=2)
    prepare(small_source, tmp_path / "again", shard_mb=0.06)
    assert same_tree(tmp_path / "out", tmp_path / "again")


@pytest.mark.usefixtures("damaged_originals")
def test_too_many_unreadable_images_stop_it(
    small_source: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(small_source, tmp_path / "whole", shard_mb=0.06)
    report = tmp_path / ".out.preparing/result/unreadable.txt"
    for limit in (0, 2):
        with pytest.raises(DataError) as stop:
            prepare(small_source, tmp_path / "out", shard_mb=0.06, max_unreadable=limit)
        assert f"{limit + 1} images cannot be read, and --max-unreadable is {limit}." in str(stop.value)
        assert f"\n  image-{UNREADABLE[limit]}.jpg: cut off\n" in str(stop.value)
        assert str(report) in str(stop.value)
        assert str(stop.value).endswith(f"begin anew: rm -r {tmp_path / '.out.preparing'}")
        assert len(report.read_text().splitlines()) == limit + 1
    capsys.readouterr()
    prepare(small_source, tmp_path / "out", shard_mb=0.06, max_unreadable=4)
    assert "going on after" in capsys.readouterr().out
    assert same_tree(tmp_path / "whole", tmp_path / "out")


def test_no_readable_image_at_all(
    small_source: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def fail(self: GeneratedSplit, position: int) -> tuple[NDArray[np.uint8], int]:
        raise UnreadableImageError(f"image-{position}.jpg: empty")

    monkeypatch.setattr(GeneratedSplit, "load", fail)
    with pytest.raises(DataError, match=r"none of the 203 images of train can be read; the first: image-0.jpg: empty"):
        prepare(small_source, tmp_path / "out", max_unreadable=1000)


def test_killed_between_publishing_and_tidying_up(
    small_source: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rename, out = os.rename, tmp_path / "out"

    def rename_and_die(source: Path, target: Path) -> None:
        rename(source, target)
        kill()

    def run() -> None:
        os.rename = rename_and_die
        prepare(small_source, out)

    def left_behind() -> None:
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.preparing", "out"]

    left_behind()
    prepare(small_source, out)
    assert "nothing to do" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(out)
    left_behind()
    shutil.rmtree(out)
    prepare(Generated(size=8, num_train=5, num_test=2, num_classes=0, seed=0), out)  # no other command's work is lost
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def photos(folder: Path, count: int = 40) -> None:
    for number in range(count):
        path = folder / f"n0000000{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path, compress_level=0)


def arguments(kind: str, tmp_path: Path) -> list[str]:
    places = {
        "folder": ["--from", "train"], "imagenet": ["--train", "train", "--val", "val"],
    }  # fmt: skip
    given = [word if word.startswith("--") else str(tmp_path / word) for word in places[kind]]
    return [kind, *given, "--size", "8", "--shard-mb", "0.01", "--num-processes", "1", "--out", str(tmp_path / "out")]


def begun(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command up to its second shard."""
    with monkeypatch.context() as patch:
        calls = []

        def fail_later(fd: int) -> None:
            calls.append(fd)
            if len(calls) > 13:
                full_disk()

        patch.setattr(os, "fsync", fail_later)
        with pytest.raises(OSError, match="No space"):
            main(command)


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
@pytest.mark.parametrize("extra", [b"", b"more"])
def test_changed_originals_are_not_mixed_with_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, extra: bytes
) -> None:
    for folder in ("train", "val"):
        photos(tmp_path / folder)
    command = arguments(kind, tmp_path)
    begun(command, monkeypatch)
    changed = tmp_path / "train/n00000001/039.png"
    changed.write_bytes(changed.read_bytes() + extra)
    with pytest.raises(DataError, match=r"the originals have changed since .* rm -r .*\.out\.preparing"):
        main(command)
    with pytest.raises(DataError, match=r"what another command has done"):
        main([*command, "--encoding", "npy"])
    shutil.rmtree(tmp_path / ".out.preparing")
    assert main(command) == 0


def test_the_same_originals_elsewhere_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "train")
    begun(arguments("folder", tmp_path), monkeypatch)
    (tmp_path / "train").rename(tmp_path / "moved")
    command = [word.replace(str(tmp_path / "train"), str(tmp_path / "moved")) for word in arguments("folder", tmp_path)]
    assert main(command) == 0
    assert "going on after 1 shards" in capsys.readouterr().out


def test_goes_back_to_an_original_that_can_be_read_again(
    small_source: Generated, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    load = GeneratedSplit.load

    def fail_at(*unreadable: int) -> None:
        def load_or_fail(self: GeneratedSplit, position: int) -> tuple[NDArray[np.uint8], int]:
            if self.first == 0 and position in unreadable:
                raise UnreadableImageError(f"image-{position}.jpg: gone")
            return load(self, position)

        monkeypatch.setattr(GeneratedSplit, "load", load_or_fail)

    fail_at(4, 70, 150)
    with pytest.raises(DataError, match="3 images cannot be read"):
        prepare(small_source, tmp_path / "out", shard_mb=0.06, max_unreadable=2)
    fail_at(4, 150)  # 4 is still gone: its shard stays
    with pytest.raises(DataError, match="2 images cannot be read"):
        prepare(small_source, tmp_path / "out", shard_mb=0.06, max_unreadable=1)
    assert "going on after 2 shards, 60 images" in capsys.readouterr().out
    fail_at()
    prepare(small_source, tmp_path / "out", shard_mb=0.06)
    assert same_tree(prepared, tmp_path / "out")


def test_an_error_of_the_disk_is_no_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "train")
    read = LooseFiles.read

    def failing(self: LooseFiles, position: int) -> bytes:
        if self.names[position].endswith("7.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(LooseFiles, "read", failing)
        for num_processes in ("1", "2"):
            with pytest.raises(DataError, match=r"7.png cannot be read: Input/output error. That is no damaged image"):
                main([*arguments("folder", tmp_path), "--num-processes", num_processes])
    assert main(arguments("folder", tmp_path)) == 0
    assert not (tmp_path / "out/unreadable.txt").exists()


def test_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []

    def listing(folder: Path) -> list[str]:
        listed.append(folder)
        return list_images(folder)

    monkeypatch.setattr(imagenet, "list_images", listing)
    for folder in ("train", "val"):
        photos(tmp_path / folder)
    assert main(arguments("imagenet", tmp_path)) == 0
    assert listed == [tmp_path / "train", tmp_path / "val"]
