"""What can be done about an allocation that failed in training: said with the error itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.config.run import RunConfig
from trainer.engine import split_batch
from trainer.exits import OutOfMemoryError, first_line, is_out_of_memory
from trainer.memory import divisors, remedies, share_of_batch
from trainer.processes import Processes


@contextmanager
def naming_the_memorys_remedies(config: RunConfig, processes: Processes) -> Iterator[None]:
    """An allocation that fails inside becomes an OutOfMemoryError that names the process and what would help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory on process {processes.rank}: {first_line(error).rstrip('.')}. "
            f"{remedy(config, processes.world_size)}."
        ) from error


def remedy(config: RunConfig, num_processes: int) -> str:
    """A smaller micro-batch where there is one, and what else could be changed."""
    micro, _ = split_batch(config, num_processes)
    smaller = next((n for n in divisors(share_of_batch(config, num_processes)) if n <= micro / 2), None)
    others = remedies(config, num_processes)
    if smaller is None:
        return f"A micro-batch is one image already: {others}"
    return (
        f"A micro-batch is {micro} images here: set a smaller train.micro_batch={smaller}, which leaves the global "
        f"batch as it is, or {others}"
    )
