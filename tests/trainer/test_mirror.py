"""Folders mirrored to storage and brought back: in the right order, whole or not at all, whatever is killed or down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT

from data_pipeline.errors import UserError
from data_pipeline.files import file_entry, write_json
from trainer.checkpoint import verify
from trainer.config.run import load_config
from trainer.mirror import MirrorProcess
from trainer.mirror_files import Cursor, held, is_mirrored
from trainer.mirror_pull import Pull
from trainer.mirror_push import Push, check_apart
from trainer.mirror_store import MirrorStore, StorageError, redact_secrets
from trainer.ports import free_port
from trainer.tracking.records import read_train_records

SECRET = "9kVerySecret/Key"


# ---- folders --------------------------------------------------------------------------------------------------------


def checkpoint_name(nimg: int) -> str:
    return f"{nimg:012d}"


def add_sealed(folder: Path, *, num_files: int = 2, size: int = 1000, kind: str = "checkpoints") -> Path:
    """A checkpoint or export as far as a mirror looks at it; the folder's name is its number."""
    folder.mkdir(parents=True)
    for rank in range(num_files):
        (folder / f"rank-{rank:05d}.safetensors").write_bytes(os.urandom(size))
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"format": 1, "files": files})
    return folder


def add_checkpoint(run: Path, nimg: int, **options: Any) -> Path:
    path = add_sealed(run / "checkpoints" / checkpoint_name(nimg), **options)
    about = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", about | {"saved_images": nimg})
    return path


def make_run(run: Path, *, run_id: str = "a", keep: int = 2, keep_every: int | None = None) -> Path:
    run.mkdir(parents=True)
    write_json(run / "run.json", {"id": run_id, "name": "r"})
    train = {"keep_checkpoints": keep, "keep_every_images": keep_every}
    (run / "config.yaml").write_text(json.dumps({"train": train}))
    (run / "metrics.0.jsonl").write_text('{"nimg": 8}\n')
    (run / "run.lock").touch()
    return run


def make_study(study: Path) -> Path:
    for trial in ("s-0", "l-0"):
        run = make_run(study / "trials" / trial, run_id=trial)
        add_checkpoint(run, 8)
        add_sealed(run / "exports" / checkpoint_name(8))
        evals = run / "evals" / checkpoint_name(8)
        for name in (".k.chunks/nll/000000.npz", "k/image.png", "k.json"):
            (evals / name).parent.mkdir(parents=True, exist_ok=True)
            (evals / name).write_text(name)
        write_json(run / "result.json", {"nimg": 8})
    for name in ("study.yaml", "events.jsonl", "status.json", "law/law.json", "law/figure.png", "study.lock", ".x.tmp"):
        (study / name).parent.mkdir(exist_ok=True)
        (study / name).write_text(f"{name}\n")
    return study


def tree(folder: Path) -> dict[str, bytes]:
    """All files that a mirror should have."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: (folder / name).read_bytes() for name in names if is_mirrored(name)}


# ---- storage --------------------------------------------------------------------------------------------------------


class Watched(MirrorStore):
    """Notes what is done to the mirror, and calls `before` first."""

    def __init__(self, url: str, before: Callable[[str, str], None] = lambda what, name: None) -> None:
        super().__init__(url)
        self.done: list[tuple[str, str]] = []
        self.before = before

    def write(self, name: str, content: bytes) -> None:
        self._do("put", name, lambda: super(Watched, self).write(name, content))

    def upload(self, name: str, path: Path, advance: Callable[[int], object]) -> None:
        self._do("put", name, lambda: super(Watched, self).upload(name, path, advance))

    def remove(self, name: str) -> None:
        self._do("remove", name, lambda: super(Watched, self).remove(name))

    def _do(self, what: str, name: str, action: Callable[[], None]) -> None:
        self.before(what, name)
        action()
        self.done.append((what, name))

    def names(self, what: str = "put") -> list[str]:
        return [name for done, name in self.done if done == what]


class Killed(BaseException):
    """What ends a process at once, as far as one can from within."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/mirror"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def push(folder: Path, url: str, store: MirrorStore | None = None, *, everything: bool = True) -> Push:
    store = store or MirrorStore(url)
    pushed = Push(folder, store, Cursor(folder, store.url))
    pushed.one_pass(everything=everything)
    return pushed


def pull(url: str, folder: Path, store: MirrorStore | None = None) -> list[str]:
    folder.mkdir(exist_ok=True)
    store = store or MirrorStore(url)
    pulled = Pull(store, folder, Cursor(folder, store.url))
    pulled.one_pass()
    return pulled.skipped


def lose_cursor(folder: Path) -> None:
    for path in folder.glob(".mirror-*"):
        path.unlink()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- order ----------------------------------------------------------------------------------------------------------


def test_what_is_proved_comes_before_what_proves_it(tmp_path: Path, url: str, mirror: Path) -> None:
    study = make_study(tmp_path / "study")
    store = Watched(url)
    push(study, url, store)
    assert tree(mirror) == tree(study)
    assert not [name for name in store.names() if ".chunks" in name or name.endswith((".lock", ".tmp"))]
    names, run = store.names(), "trials/s-0"
    order = [
        f"{run}/run.json", "study.yaml", f"{run}/metrics.0.jsonl",
        f"{run}/checkpoints/000000000008/rank-00000.safetensors", f"{run}/checkpoints/000000000008/manifest.json",
        f"{run}/exports/000000000008/rank-00000.safetensors", f"{run}/exports/000000000008/manifest.json",
        f"{run}/result.json", "events.jsonl",
    ]  # fmt: skip
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    last = names.index(f"{run}/exports/000000000008/manifest.json")
    assert names.index(f"{run}/evals/000000000008/k.json") > last
    assert names.index(f"{run}/evals/000000000008/k/image.png") < last
    # The id goes first, what promises a checkpoint after the checkpoint.
    assert names[last:].count(f"{run}/run.json") == 1


def test_a_second_push_sends_what_changed_and_one_without_cursor_no_checkpoint(tmp_path: Path, url: str) -> None:
    study = make_study(tmp_path / "study")
    push(study, url)
    again = Watched(url)
    push(study, url, again)
    assert again.done == []
    with open(study / "events.jsonl", "a") as file:
        file.write("more\n")
    push(study, url, again)
    assert again.names() == ["events.jsonl"]
    lose_cursor(study)
    without = Watched(url)
    push(study, url, without)
    assert not [name for name in without.names() if "checkpoints" in name or "exports" in name]


def test_killed_anywhere_it_leaves_no_checkpoint_that_is_not_whole(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    for nimg in (8, 16):
        add_checkpoint(run, nimg)
    whole = 0
    for number in range(100):
        left = number

        def die(what: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        shutil.rmtree(mirror, ignore_errors=True)
        lose_cursor(run)
        try:
            push(run, url, Watched(url, die))
        except Killed:
            back = tmp_path / f"back-{number}"
            shutil.rmtree(back, ignore_errors=True)
            if mirror.exists() and any(mirror.iterdir()):
                pull(url, back)
            found = [path for path in back.glob("checkpoints/*") if not path.name.startswith(".")]
            assert all(verify(path) is None for path in found)
            whole += len(found)
            if found:  # nothing that its records lead up to is missing
                assert (back / "metrics.0.jsonl").exists()
            elif (back / "run.json").exists():
                assert "saved_images" not in json.loads((back / "run.json").read_text())
        else:
            break
    assert number > 8
    assert whole > 0


def test_killed_by_9_a_push_goes_on(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 8, num_files=100, size=1 << 20)
    there = mirror / "checkpoints" / checkpoint_name(8)
    process = subprocess.Popen([sys.executable, "-m", "trainer.mirror", "push", str(run), url], cwd=ROOT)
    wait_until(lambda: (there / "rank-00003.safetensors").exists())
    process.kill()
    process.wait()
    assert not (there / "manifest.json").exists()
    pull(url, tmp_path / "early")
    assert not (tmp_path / "early" / "checkpoints" / checkpoint_name(8)).exists()
    push(run, url)
    pull(url, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(run)


# ---- removal --------------------------------------------------------------------------------------------------------


def test_old_checkpoints_go_after_newer_ones_are_complete_and_their_manifest_first(
    tmp_path: Path, url: str, mirror: Path
) -> None:
    run = make_run(tmp_path / "run", keep=1)
    old = add_checkpoint(run, 8)
    push(run, url)
    shutil.rmtree(old)
    store = Watched(url)
    push(run, url, store)
    assert store.names("remove") == []  # there is no newer one yet
    add_checkpoint(run, 16)
    push(run, url, store)
    checkpoints = [(what, name.removeprefix("checkpoints/")) for what, name in store.done if "checkpoints" in name]
    assert checkpoints[2:] == [
        ("put", "000000000016/manifest.json"),
        ("remove", "000000000008/manifest.json"),
        ("remove", "000000000008/rank-00000.safetensors"),
        ("remove", "000000000008/rank-00001.safetensors"),
    ]
    assert tree(mirror) == tree(run)


def test_only_what_the_run_would_remove_is_removed(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run", keep=1, keep_every=16)
    for nimg in (8, 16, 24):
        add_checkpoint(run, nimg)
    push(run, url)
    # A disk that holds the newest one alone, as an interrupted pull leaves it; and no memory of what it had.
    for nimg in (8, 16):
        shutil.rmtree(run / "checkpoints" / checkpoint_name(nimg))
    lose_cursor(run)
    push(run, url)
    found = sorted(path.parent.name for path in mirror.glob("checkpoints/*/manifest.json"))
    assert found == [checkpoint_name(16), checkpoint_name(24)]
    # What is newer there is another machine's, which may be sending it.
    for nimg in (20, 32):
        (mirror / "checkpoints" / checkpoint_name(nimg)).mkdir()
        (mirror / "checkpoints" / checkpoint_name(nimg) / "rank-00000.safetensors").touch()
    push(run, url)
    assert sorted(path.parent.name for path in mirror.glob("checkpoints/*/rank-00000.safetensors")) == [
        checkpoint_name(16), checkpoint_name(24), checkpoint_name(32),
    ]  # fmt: skip


def test_a_folder_that_is_gone_takes_nothing_with_it(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 8)
    write_json(run / "result.json", {"nimg": 8})
    store = Watched(url)
    pushed = push(run, url, store)
    before = tree(mirror)
    for path in run.iterdir():  # a disk that is not mounted
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pushed.one_pass(everything=True)
    assert store.names("remove") == []
    assert tree(mirror) == before


def test_a_withdrawn_result_and_segment_are_withdrawn(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("result.json", "verdict.json", "metrics.16.jsonl"):
        (run / name).write_text("{}\n")
    push(run, url)
    for name in ("result.json", "verdict.json", "metrics.16.jsonl"):
        (run / name).unlink()
    push(run, url)
    assert tree(mirror) == tree(run)


# ---- files that change or vanish ------------------------------------------------------------------------------------


def test_a_checkpoint_that_changes_while_it_is_sent_gets_no_manifest(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    path = add_checkpoint(run, 8)

    def spoil(what: str, name: str) -> None:
        if name.endswith("rank-00001.safetensors"):
            (path / "rank-00001.safetensors").write_bytes(b"x" * 1000)

    pushed = push(run, url, Watched(url, spoil))
    assert pushed.num_incomplete == 1
    assert not (mirror / "checkpoints" / path.name / "manifest.json").exists()
    push(run, url)  # its files do not match the manifest now
    assert not (mirror / "checkpoints" / path.name / "manifest.json").exists()


def test_a_checkpoint_that_the_run_removes_while_it_is_sent_is_no_error(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run", keep=1)
    path = add_checkpoint(run, 8)

    def remove(what: str, name: str) -> None:
        if name.endswith("00008/rank-00001.safetensors"):
            shutil.rmtree(path, ignore_errors=True)

    assert push(run, url, Watched(url, remove)).num_incomplete == 0
    assert [p.name for p in (mirror / "checkpoints" / path.name).iterdir()] == ["rank-00000.safetensors"]
    add_checkpoint(run, 16)
    push(run, url)
    assert tree(mirror) == tree(run)  # its beginning is gone, too


def test_another_checkpoint_of_the_same_name_replaces_the_first(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    path = add_checkpoint(run, 8)
    push(run, url)
    shutil.rmtree(path)
    add_checkpoint(run, 8)
    store = Watched(url)
    push(run, url, store)
    checkpoint = [(what, name.rpartition("/")[2]) for what, name in store.done if "checkpoints" in name]
    assert checkpoint[0] == ("remove", "manifest.json")
    assert checkpoint[-1] == ("put", "manifest.json")
    assert tree(mirror) == tree(run)


def test_a_growing_file_is_sent_as_it_was_and_again(
    tmp_path: Path, url: str, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    metrics = run / "metrics.0.jsonl"

    def grow(what: str, name: str) -> None:
        if name.startswith("metrics"):
            with open(metrics, "a") as file:
                file.write("next\n")

    store = Watched(url, grow)
    pushed = push(run, url, store)
    assert (mirror / metrics.name).read_text() == '{"nimg": 8}\n'
    pushed.one_pass(everything=True)
    assert (mirror / metrics.name).read_text() == '{"nimg": 8}\nnext\n'
    # A large one is sent less often, but before a checkpoint that its records lead up to.
    monkeypatch.setattr("trainer.mirror_sender._SECONDS_PER_BYTE", 100.0)
    pushed.one_pass(everything=False)
    assert store.names().count(metrics.name) == 2
    add_checkpoint(run, 8)
    pushed.one_pass(everything=False)
    assert store.names().count(metrics.name) == 3
    names = store.names()
    assert max(i for i, name in enumerate(names) if name == metrics.name) < next(
        i for i, name in enumerate(names) if "checkpoints" in name
    )


# ---- pull -----------------------------------------------------------------------------------------------------------


def test_damaged_and_incomplete_checkpoints_are_skipped_and_said(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run", keep=9)
    for nimg in (8, 16, 24, 32):
        add_checkpoint(run, nimg)
    push(run, url)
    damaged = mirror / "checkpoints" / checkpoint_name(32) / "rank-00001.safetensors"
    damaged.write_bytes(b"x" * 1000)
    (mirror / "checkpoints" / checkpoint_name(24) / "rank-00000.safetensors").unlink()
    (mirror / "checkpoints" / checkpoint_name(16) / "manifest.json").unlink()
    skipped = pull(url, tmp_path / "back")
    assert [line.split(":")[0][-2:] for line in skipped] == ["32", "24", "16"]
    assert "damaged" in skipped[0]
    assert "missing" in skipped[1]
    assert "no manifest" in skipped[2]
    assert [path.name for path in (tmp_path / "back" / "checkpoints").iterdir()] == [checkpoint_name(8)]


def test_an_interrupted_pull_goes_on_within_a_file(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.mirror_store._BLOCK", 1000)
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 8, num_files=1, size=10_000)
    push(run, url)

    class Breaking(MirrorStore):
        left = 4
        starts: list[int]

        def blocks(self, name: str, start: int, stop: int) -> Iterator[bytes]:
            self.starts = [*getattr(self, "starts", []), start]
            for block in super().blocks(name, start, stop):
                self.left -= 1
                if self.left == 0:
                    raise StorageError("it broke")
                yield block

    store, back = Breaking(url), tmp_path / "back"
    with pytest.raises(StorageError):
        pull(url, back, store)
    assert (back / "run.json").exists()  # so that nobody starts a run afresh here
    assert not (back / "checkpoints" / checkpoint_name(8)).exists()
    pull(url, back, store)
    assert store.starts == [0, 3_000]
    assert tree(back) == tree(run)


def test_nothing_newer_is_overwritten(tmp_path: Path, url: str, mirror: Path) -> None:
    run, back = make_run(tmp_path / "run"), tmp_path / "back"
    add_checkpoint(run, 8)
    push(run, url)
    pull(url, back)
    with open(back / "metrics.0.jsonl", "a") as file:
        file.write("newer\n")
    (back / "config.yaml").write_text("mine")
    assert [line.split(":")[0] for line in pull(url, back)] == ["config.yaml"]
    assert (back / "config.yaml").read_text() == "mine"
    assert "newer" in (back / "metrics.0.jsonl").read_text()
    with open(run / "events.jsonl", "w") as file:
        file.write("whole\nbegun")
    push(run, url)
    pull(url, back)
    assert (back / "events.jsonl").read_text() == "whole\n"


def test_a_run_that_went_on_elsewhere_replaces_what_was_left_here(tmp_path: Path, url: str) -> None:
    here, there = make_run(tmp_path / "here"), tmp_path / "there"
    add_checkpoint(here, 8)
    push(here, url)
    (here / "metrics.8.jsonl").write_text('{"nimg": 16}\n')  # came when the mirror was not reached any more
    (here / "metrics.16.jsonl").write_text('{"nimg": 24}\n')
    pull(url, there)
    (there / "metrics.8.jsonl").write_text('{"nimg": 16, "other": 1}\n{"nimg": 32}\n')
    add_checkpoint(there, 32)
    push(there, url)
    pull(url, here)
    assert {name: (here / name).read_bytes() for name in tree(there)} == tree(there)
    assert not (here / "metrics.16.jsonl").exists()
    assert (here / "metrics.16.jsonl.aside").read_text() == '{"nimg": 24}\n'


def test_a_damaged_checkpoint_here_is_replaced_and_kept(tmp_path: Path, url: str) -> None:
    run = make_run(tmp_path / "run")
    path = add_checkpoint(run, 8)
    push(run, url)
    whole = tree(run)
    (path / "rank-00000.safetensors").write_bytes(b"short")
    pull(url, run)
    assert {name: content for name, content in tree(run).items() if "damaged" not in name} == whole
    assert (path.with_name(f"{path.name}.damaged") / "rank-00000.safetensors").read_bytes() == b"short"


def test_another_run_is_refused_in_both_directions(tmp_path: Path, url: str, mirror: Path) -> None:
    push(make_run(tmp_path / "a", run_id="a"), url)
    other, before = make_run(tmp_path / "b", run_id="b"), tree(mirror)
    add_checkpoint(other, 8)
    assert "another run" in push(other, url).refused[0]
    assert tree(mirror) == before
    mine = tree(other)
    with pytest.raises(UserError, match="another run"):
        pull(url, other)
    assert tree(other) == mine
    study = make_study(tmp_path / "study")
    with pytest.raises(UserError, match="holds a run"):
        pull(url, study)


def test_one_foreign_trial_does_not_keep_the_others(tmp_path: Path, url: str, mirror: Path) -> None:
    study = make_study(tmp_path / "study")
    push(study, url)
    shutil.rmtree(study / "trials" / "s-0")
    make_run(study / "trials" / "s-0", run_id="new")
    add_checkpoint(study / "trials" / "l-0", 16)
    assert len(push(study, url).refused) == 1
    assert (mirror / "trials/l-0/checkpoints/000000000016/manifest.json").exists()
    assert json.loads((mirror / "trials/s-0/run.json").read_text())["id"] == "s-0"


def test_a_folder_in_use_is_refused(tmp_path: Path, url: str) -> None:
    study = make_study(tmp_path / "study")
    push(study, url)
    for lock in ("study.lock", "trials/s-0/run.lock"):
        command = [sys.executable, "-c", "import sys, fcntl; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX);"
                   "print('held', flush=True); sys.stdin.read()", str(study / lock)]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="is in use"):
                pull(url, study)
            process.communicate()
    pull(url, study)
    cursor = Cursor(study, url)
    with held(cursor.lock_path, ""), pytest.raises(UserError, match="being pushed"), cursor.lock():
        pass


def test_addresses_that_cannot_be_mirrors_are_refused(tmp_path: Path, tiny_config: Path) -> None:
    for address, why in [
        ("/plain/path", "a mirror is a URL"), (f"s3://me:{SECRET}@bucket/x", "password"), ("https://h/x", "HTTP"),
        ("nosuch://x/y", "nosuch"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=why) as caught:
            MirrorStore(address)
        assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match=r"run.mirror.*password") as caught:
        load_config(tiny_config, [f"run.mirror=s3://me:{SECRET}@bucket/x"])
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match="lie in each other"):
        check_apart(tmp_path, MirrorStore(f"file://{tmp_path}/x"))


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"pip install 'diffusion-scaling\[remote\]'"):
        MirrorStore("s3://bucket/x")


# ---- S3, and the commands -------------------------------------------------------------------------------------------


def environment_for(endpoint: str) -> dict[str, str]:
    """What a user would set for an S3 server on loopback."""
    return {
        "FSSPEC_S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "AKIA0123", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip


def test_secrets_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text = redact_secrets(f"https://a:b@host/x?X-Amz-Signature=abc123&y=1 {SECRET}")
    assert text == "https://***@host/x?X-Amz-Signature=***&y=1 ***"


@contextmanager
def serve_s3(port: int = 0) -> Iterator[str]:
    """Run moto's S3 on loopback; gives its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of a server with a bucket `runs`."""
    pytest.importorskip("moto.server", reason="needs the extra 'dev'")
    s3fs = pytest.importorskip("s3fs", reason="needs the extra 'remote'")
    with serve_s3() as endpoint:
        s3fs.S3FileSystem(endpoint_url=endpoint, key="AKIA0123", secret=SECRET, skip_instance_cache=True).mkdir("runs")
        yield endpoint


def run_command(*arguments: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "trainer.mirror", *arguments], os.environ | environment_for(endpoint)
    return subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=60)


def test_a_study_goes_to_s3_and_comes_back(tmp_path: Path, s3: str) -> None:
    study, back = make_study(tmp_path / "study"), tmp_path / "back"
    add_checkpoint(study / "trials" / "l-0", 16, size=1 << 20)
    done = run_command("push", str(study), "s3://runs/study/", endpoint=s3)
    assert done.returncode == 0, done.stderr
    assert "pushed: 100%" in done.stderr.replace("\r", "\n")
    done = run_command("pull", "s3://runs/study", str(back), endpoint=s3)
    assert done.returncode == 0, done.stderr
    assert tree(back) == tree(study)
    add_checkpoint(study / "trials" / "l-0", 24)
    shutil.rmtree(study / "trials" / "l-0" / "checkpoints" / checkpoint_name(8))
    for words in (("push", str(study), "s3://runs/study"), ("pull", "s3://runs/study", str(back))):
        assert run_command(*words, endpoint=s3).returncode == 0
    assert set(tree(back)) - set(tree(study)) == {
        f"trials/l-0/checkpoints/{checkpoint_name(8)}/{name}"  # nothing is deleted here
        for name in ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")
    }
    done = run_command("push", str(make_run(tmp_path / "other", run_id="b")), "s3://runs/study/trials/s-0", endpoint=s3)
    assert done.returncode == 2
    assert "another run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_storage_that_refuses_or_is_down_is_told_once_and_without_secrets(tmp_path: Path, s3: str) -> None:
    run = make_run(tmp_path / "run")
    for url, endpoint in (("s3://none/run", s3), ("s3://runs/run", f"http://127.0.0.1:{free_port()}")):
        done = run_command("push", str(run), url, "--patience", "0.5", endpoint=endpoint)
        text = done.stdout + done.stderr
        assert done.returncode == 2
        assert url in text
        assert text.count("warning:") == text.count("error:") == 1
        assert "Traceback" not in text
        assert SECRET not in text
        assert "AKIA0123" not in text


def test_a_follower_sends_all_when_the_storage_comes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("moto.server", reason="needs the extra 'dev'")
    import s3fs

    run, port = make_run(tmp_path / "run"), free_port()
    add_checkpoint(run, 8)
    for key, value in environment_for(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(key, value)
    child = MirrorProcess(run, "s3://late/run")
    warned = ""
    while "cannot be listed" not in warned:
        warned += capfd.readouterr().err
        time.sleep(0.05)
    with serve_s3(port) as endpoint:
        fs = s3fs.S3FileSystem(endpoint_url=endpoint, key="AKIA0123", secret=SECRET, skip_instance_cache=True)
        fs.mkdir("late")
        wait_until(lambda: fs.find("late/run/checkpoints/000000000008/manifest.json") != [])
        with open(run / "metrics.0.jsonl", "a") as file:
            file.write("last\n")
        child.stop()
        fs.invalidate_cache()
        assert fs.cat_file("late/run/metrics.0.jsonl").endswith(b"last\n")
    text = warned + capfd.readouterr().err
    assert text.count("warning:") == 2, text  # that it is down, and that it is up
    assert SECRET not in text


def test_a_follower_outlives_a_killed_owner_only_to_send_what_is_left(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    owner = (
        "import sys, time; from pathlib import Path; from trainer.mirror import MirrorProcess\n"
        "print(MirrorProcess(Path(sys.argv[1]), sys.argv[2])._process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", owner, str(run), url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        wait_until(lambda: (mirror / "metrics.0.jsonl").exists())
        add_checkpoint(run, 8)
        process.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])
    assert tree(mirror) == tree(run)


def test_what_comes_after_a_signal_to_the_whole_job_is_sent(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    child = MirrorProcess(run, url)
    wait_until(lambda: (mirror / "metrics.0.jsonl").exists())
    child._process.send_signal(signal.SIGUSR1)
    child._process.send_signal(signal.SIGTERM)
    assert child._process.wait(20) == 3
    add_checkpoint(run, 8)  # what the run saves before it ends
    child.stop()
    assert tree(mirror) == tree(run)


def test_a_follower_ends_when_the_run_is_finished(tmp_path: Path, url: str, mirror: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run / "result.json", {"nimg": 8})
    child = MirrorProcess(run, url)
    assert child._process.wait(20) == 0
    assert tree(mirror) == tree(run)


# ---- a real run -----------------------------------------------------------------------------------------------------


def start_training(config: Path, folder: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "trainer/run.py", "--config", str(config), f"run.folder={folder}", *settings]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train(config: Path, folder: Path, *settings: str) -> str:
    process = start_training(config, folder, *settings)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text
    return text


def assert_same_run(run: Path, straight: Path, nimg: int) -> None:
    """The same weights, moments and losses, bit for bit."""
    files = sorted((straight / "checkpoints" / checkpoint_name(nimg)).glob("*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (run / path.relative_to(straight)).read_bytes()
    losses = [[(r.nimg, r.values["train/loss"]) for r in read_train_records(folder)] for folder in (run, straight)]
    assert losses[0] == losses[1]


def test_a_run_goes_on_from_its_mirror_as_if_nothing_had_happened(
    tiny_config: Path, tmp_path: Path, url: str, mirror: Path
) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    train(tiny_config, straight)
    train(tiny_config, folder, "train.budget_images=24", f"run.mirror={url}")
    assert tree(mirror) == tree(folder)
    shutil.rmtree(folder)
    assert pull(url, folder) == []
    assert "resuming at 24 images" in train(tiny_config, folder)
    assert_same_run(folder, straight, 48)


@pytest.mark.prove
def test_a_run_whose_machine_died_goes_on_from_its_mirror(
    tiny_config: Path, tmp_path: Path, url: str, mirror: Path
) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    settings = ["train.budget_images=2400", "train.checkpoint_every_images=48", "train.keep_checkpoints=2"]
    process = start_training(tiny_config, folder, *settings, f"run.mirror={url}")
    wait_until(lambda: len(list(mirror.glob("checkpoints/*/manifest.json"))) > 1, seconds=120)
    there = max(int(path.parent.name) for path in mirror.glob("checkpoints/*/manifest.json"))
    process.kill()
    process.communicate()  # the child, too, has ended now
    shutil.rmtree(folder)
    assert pull(url, folder) == []
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert there <= newest < 2400
    assert f"resuming at {newest:,} images" in train(tiny_config, folder, *settings, f"run.mirror={url}")
    assert tree(mirror).keys() == tree(folder).keys()
    train(tiny_config, straight, *settings)
    assert_same_run(folder, straight, 2400)
