"""How a training process ends: the exit codes, and the errors that have one of their own. Standard library only."""

from __future__ import annotations

import errno
import traceback
from enum import IntEnum

from data_pipeline.errors import INTERRUPTED_EXIT, NO_SPACE_EXIT, USER_ERROR_EXIT, AgreedError, UserError, disk_error

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")


class Exit(IntEnum):
    """Exit codes of `trainer/run.py`."""

    FINISHED = 0  # the budget is reached
    CRASHED = 1  # an error that nobody foresaw: a traceback says where
    USER_ERROR = USER_ERROR_EXIT  # a mistake that the message explains: the same command would fail again
    STOPPED = 3  # stopped on request, after saving: the same command continues
    LOST = 4  # another process of the job died or hung: the same command continues
    DIVERGED = 5  # no finite loss or gradient for too many steps: other settings are needed
    OUT_OF_MEMORY = 6  # of a device or of the host: a smaller micro-batch is needed
    BUSY = 7  # the run's folder or the job's port is in use: the same command works when it is free
    NO_SPACE = NO_SPACE_EXIT  # the disk is full: the same command continues when there is space
    INTERRUPTED = INTERRUPTED_EXIT  # Ctrl-C twice: ended at once, without saving


class DivergedError(AgreedError):
    """The run's loss or gradient is no longer finite, and skipping steps did not help."""

    exit_code = Exit.DIVERGED


class BusyError(UserError):
    """Another job has what this one needs, a folder or a port."""

    exit_code = Exit.BUSY


class WorkerDiedError(UserError):
    """A process that made batches died: killed, or out of shared memory."""

    exit_code = Exit.LOST


class OutOfMemoryError(UserError):
    """An allocation failed on this process, on its device or in its host's memory."""

    exit_code = Exit.OUT_OF_MEMORY


def explained(error: BaseException) -> UserError | None:
    """The error as one message with an exit code, where a message without a traceback says enough; else None."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(f"out of memory: {first_line(error)}")
    return disk_error(error)


def failure(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error, for an AgreedError; prints the traceback of one that nobody foresaw."""
    known = explained(error)
    if known is not None:
        return str(known), known.exit_code
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}", Exit.CRASHED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of Python, numpy, torch or the system.

    Torch's allocators of devices raise a RuntimeError of a type of its own, the CPU's and some libraries' a bare one:
    what all have in common is their words.
    """
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
