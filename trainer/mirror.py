"""A run or study folder mirrored to object storage, and brought back from there.

    python -m trainer.mirror push FOLDER URL [--follow]
    python -m trainer.mirror pull URL FOLDER

FOLDER is a run folder, or a study folder holding `trials/*`. URL is s3://bucket/folder, gs://bucket/folder,
file:///folder or any other of fsspec's; credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, ...).
`push` sends what is new, a checkpoint's manifest after all its files; `pull` verifies every checkpoint and export and
overwrites nothing that is newer. Both go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError, run_cli
from data_pipeline.progress import progress_bar, say
from trainer.mirror_files import Cursor
from trainer.mirror_pull import Pull
from trainer.mirror_push import Push, check_apart
from trainer.mirror_store import MirrorStore, StorageError, redact_secrets, shown
from trainer.tracking.follow import StopRequest, follow

_POLL_SECONDS = 5.0
_PATIENCE_SECONDS = 300.0  # for a storage that does not answer, without --follow
_LAST_PASS_SECONDS = 60.0  # for what is left to send when a run ends
_UNFINISHED_EXIT = 3  # of a child that was asked to stop before the run was finished


class MirrorProcess:
    """The child that mirrors `folder` while its owner lives. Credentials are in the environment."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._process = self._start("--follow")

    def stop(self, timeout: float = _LAST_PASS_SECONDS) -> None:
        """Ask for the last pass and wait for it; a storage that is too slow is left behind."""
        if self._process.poll() is None:
            self._process.terminate()
        elif self._process.returncode == _UNFINISHED_EXIT:  # a signal to the whole job ended it: what came later
            self._process = self._start()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            _warn(f"the mirror was not complete after {timeout:.0f} s. {_by_hand(self._folder, self._url)}")

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trainer.mirror", "push", str(self._folder), self._url, *options]
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        root = str(Path(__file__).resolve().parents[1])  # the working directory may be another
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # A session of its own: Ctrl-C is for the run, which saves and then asks for the last pass.
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.mirror", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="send what is new in a folder to its mirror")
    push.add_argument("folder", type=Path, help="a run folder, or a study folder holding trials/*")
    push.add_argument("url", help="where the mirror is: the run's or study's own folder there")
    push.add_argument("--follow", action="store_true", help="keep sending until the run is finished or we are ended")
    pull = commands.add_parser("pull", help="bring a mirrored folder to a disk")
    pull.add_argument("url")
    pull.add_argument("folder", type=Path)
    for command in (push, pull):
        command.add_argument("--patience", type=float, default=_PATIENCE_SECONDS, metavar="SECONDS",
                             help="until a storage that transfers nothing is given up (%(default)g)")  # fmt: skip
    args = parser.parse_args()
    if args.command == "pull":
        return _pull(args.url, args.folder, args.patience)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder; give a run folder or a study folder.")
    if args.follow:
        return _follow(args.folder, args.url)
    return _push(args.folder, args.url, args.patience)


def _push(folder: Path, url: str, patience: float) -> int:
    store = MirrorStore(url)
    check_apart(folder, store)
    cursor = Cursor(folder, store.url)
    with cursor.lock(), _Progress("pushed") as progress:
        push = Push(folder, store, cursor, advance=progress.advance, say=say)

        def one_pass() -> None:
            progress.expect(push.num_bytes())
            push.one_pass(everything=True)

        _persist(one_pass, cursor, store, patience)
    if push.refused:
        raise UserError("not mirrored:\n  " + "\n  ".join(push.refused))
    behind = (
        f"; {push.num_incomplete} files or folders could not be read whole: push again" if push.num_incomplete else ""
    )
    print(f"{folder} is mirrored at {store}{behind}")
    return 0


def _pull(url: str, folder: Path, patience: float) -> int:
    store = MirrorStore(url)
    check_apart(folder, store)
    folder.mkdir(parents=True, exist_ok=True)
    cursor = Cursor(folder, store.url)
    with cursor.lock(), _Progress("pulled") as progress:
        pull = Pull(store, folder, cursor, advance=progress.advance)

        def one_pass() -> None:
            progress.expect(pull.num_bytes())
            pull.one_pass()

        _persist(one_pass, cursor, store, patience)
    for line in pull.skipped:
        _warn(line)
    print(f"{folder} holds what is at {store}" + (f", but for {len(pull.skipped)} things" if pull.skipped else ""))
    return 0


class _Progress:
    """A bar of bytes, if there are any to transfer."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None

    def expect(self, num_bytes: int) -> None:
        """So many are still to come."""
        if self._bar is not None:
            self._bar.total = self._bar.n + num_bytes
        elif num_bytes:
            self._bar = progress_bar(total=num_bytes, unit="B", scale=True, description=self._description)

    def advance(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(num_bytes)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _persist(one_pass: Callable[[], None], cursor: Cursor, store: MirrorStore, patience: float) -> None:
    """Do `one_pass`, again after growing pauses where the storage fails, as long as there is some progress.

    Raises what is not the storage's fault at once, and UserError when nothing was transferred for `patience` seconds.
    """
    error: Exception | None = None
    failing_since = noted = 0.0

    def attempt() -> bool:
        nonlocal error, failing_since, noted
        try:
            one_pass()
            error = None
        except StorageError as failure:
            if error is None or cursor.num_noted > noted:
                failing_since, noted = time.monotonic(), cursor.num_noted
            error = failure
            raise
        except Exception as failure:
            error = failure
        return True

    def report(failure: Exception | None) -> None:
        if failure is not None:
            _warn(f"{failure}; trying again")
        elif error is None:
            _warn(f"{store} answers again")

    follow(attempt, report=report, stop=lambda: error is not None and time.monotonic() - failing_since > patience)
    if isinstance(error, StorageError):
        raise UserError(f"{error}. Check address, credentials and network, and run the same command again.")
    if error is not None:
        raise error


def _follow(folder: Path, url: str) -> int:
    stop = StopRequest()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's warning to the whole job: the run saves first
    if sys.stdin is not None and sys.stdin.isatty():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # started by hand
    try:
        store = MirrorStore(url)
        check_apart(folder, store)
    except UserError as error:
        _warn(f"nothing is mirrored: {error} Training goes on. {_by_hand(folder, url)}")
        return 0
    follower = _Follower(folder, store, stop)
    follow(follower.one_pass, report=follower.report, stop=stop, poll_seconds=_POLL_SECONDS)
    if follower.is_behind:
        _warn(f"{store} lacks what came last. {_by_hand(folder, url)}")
    return 0 if follower.is_finished else _UNFINISHED_EXIT


class _Follower:
    """Passes over a folder that somebody works in, until the run is finished or `stop` says so."""

    def __init__(self, folder: Path, store: MirrorStore, stop: StopRequest) -> None:
        self._folder, self._store, self._stop = folder, store, stop
        self._cursor = Cursor(folder, store.url)
        self._push = Push(folder, store, self._cursor, say=_warn)
        self._lock = ExitStack()  # held from the first pass to the end of the process
        self._is_locked = False
        self.is_behind = True  # after the last pass
        self.is_finished = False

    def one_pass(self) -> bool:
        self.is_behind = True
        if not self._is_locked:
            self._lock.enter_context(self._cursor.lock())
            self._is_locked = True
        self.is_finished = self._push.one_pass(everything=bool(self._stop))
        if self._push.refused:
            raise UserError("; ".join(self._push.refused))
        self.is_behind = self._push.num_incomplete > 0
        return self.is_finished

    def report(self, error: Exception | None) -> None:
        if error is None:
            _warn(f"{self._store} is complete again")
        else:
            text = redact_secrets(str(error) if isinstance(error, StorageError | UserError) else repr(error))
            _warn(f"{text}. Training goes on; what is in {self._folder} will be sent when that is mended")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _by_hand(folder: Path, url: str) -> str:
    return f"Send the rest later: python -m trainer.mirror push {folder} {shown(url)}"


if __name__ == "__main__":
    run_cli(main)
