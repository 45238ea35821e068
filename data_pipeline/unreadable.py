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
        self.lines: list[str] = []
        path.unlink(missing_ok=True)

    def add(self, line: str) -> None:
        """Add a line.

        Raises:
            DataError: there are more than `limit` now.
        """
        self.extend([" ".join(line.split()).encode("utf-8", "backslashreplace").decode()])  # names hold anything

    def extend(self, lines: Iterable[str]) -> None:
        """As `add`, with lines that were in a report already."""
        for line in lines:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            self.lines.append(line)
        if len(self.lines) > self._limit:
            raise DataError(
                f"{len(self.lines)} images cannot be read, and --max-unreadable is {self._limit}. The last of them:"
                + "".join(f"\n  {line}" for line in self.lines[-_SHOWN:])
                + f"\nAll are listed in {self._path}. Mend the originals, or run the same command with a higher "
                "--max-unreadable: it leaves them out and goes on."
            )
