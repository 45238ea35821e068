"""Errors a user can mend, and the one place where command lines turn them into a message."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_EXIT = 2
NO_SPACE_EXIT = 8  # as among the trainer's, trainer/exits.py
INTERRUPTED_EXIT = 130


class UserError(Exception):
    """A mistake or a missing thing that the user can mend.

    Its text says what is wrong, where, and what would be right; it is shown without a traceback. `exit_code` is what
    the process ends with.
    """

    exit_code: int = USER_ERROR_EXIT


class ConfigError(UserError):
    """A config value that is unknown or impossible: names the key's path, the value and the remedy."""


class DataError(UserError):
    """Missing, damaged or unsuitable data: names the file and the remedy."""


class DiskFullError(UserError):
    """No space left, or no more allowed: the same command goes on when there is some."""

    exit_code = NO_SPACE_EXIT


class AgreedError(UserError):
    """A `UserError` that all processes of a job raise together, so that one of them shows it for all.

    `exit_code`: of the error that it began with on one of them.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


def disk_error(error: BaseException) -> UserError | None:
    """An error that the user can mend at the disk (full, no permission) as a message, else None."""
    where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
    code = error.errno if isinstance(error, OSError) else None
    # Writers outside Python (safetensors) raise an error of their own and tell only in words.
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return DiskFullError(
            f"the disk is full{where}. Free some space and run the same command again: nothing earlier was lost."
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"permission denied{where}: {error}. Choose a folder that you can write to.")
    return None


def disk_message(error: BaseException) -> str | None:
    """The words of `disk_error`."""
    mendable = disk_error(error)
    return None if mendable is None else str(mendable)


def exit_with(message: str, code: int = USER_ERROR_EXIT) -> NoReturn:
    """Print `error: message` on stderr and end the process with `code`."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main`; user errors become one message and their exit code, Ctrl-C 130."""
    try:
        code = main()
    except UserError as error:
        exit_with(str(error), error.exit_code)
    except KeyboardInterrupt:
        exit_with("interrupted.", INTERRUPTED_EXIT)
    except BrokenPipeError:
        # The reader of our output (`| head`) went away: not an error, but Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        mendable = disk_error(error)
        if mendable is None:
            raise
        exit_with(str(mendable), mendable.exit_code)
    raise SystemExit(code or 0)
