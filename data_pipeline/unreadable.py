"""The report on originals that cannot be read: a line each, at once, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import DataError

_SHOWN = 3  # in the error


class UnreadableReport:
    """Lines "file: reason" in the file `path`, which exists from the first line on."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        self.noted: list[tuple[int, str]] = []  # position in its split, line
        path.unlink(missing_ok=True)

    def add(self, position: int, line: str) -> None:
        """Add a line.

        Raises:
            DataError: there are more than `limit` now.
        """
        line = " ".join(line.split()).encode("utf-8", "backslashreplace").decode()  # names hold anything
        self.extend([(position, line)])

    def extend(self, noted: Iterable[tuple[int, str]]) -> None:
        """As `add`, with lines that were in a report already."""
        for position, line in noted:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            self.noted.append((position, line))
        if len(self.noted) > self._limit:
            raise DataError(
                f"{len(self.noted)} images cannot be read, and --max-unreadable is {self._limit}. The last of them:"
                + "".join(f"\n  {line}" for _, line in self.noted[-_SHOWN:])
                + f"\nAll are listed in {self._path}. Run the same command with a higher --max-unreadable: it leaves "
                f"them out and goes on. Or mend the originals and begin anew: rm -r {self._path.parent.parent}"
            )
