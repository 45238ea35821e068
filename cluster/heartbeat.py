"""A sign of life while something takes its time. Standard library only: it must work before the slow imports."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS = 8.0


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Print `what` with its seconds whenever 8 s have passed in the block."""
    over = threading.Event()
    began = time.monotonic()

    def beat() -> None:
        while not over.wait(_SECONDS):
            print(f"{what} ... {time.monotonic() - began:.0f} s", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
