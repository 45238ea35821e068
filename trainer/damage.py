"""Damaged samples that substitutes took the place of: named once, counted, and too many of them end the run."""

from __future__ import annotations

import sys

from tqdm import tqdm

from data_pipeline.errors import DataError


class DamageWatch:
    """One process's damaged samples, in one life of a run."""

    def __init__(self, max_damaged: int) -> None:
        self._max_damaged = max_damaged
        self._known: set[int] = set()

    def look(self, damaged: dict[int, str]) -> None:
        """Name the samples that are new among `damaged` (their numbers, and what is wrong).

        Raises:
            DataError: there are more of them by now than `max_damaged`.
        """
        for sample, what in damaged.items():
            if sample in self._known:
                continue
            self._known.add(sample)
            if len(self._known) > self._max_damaged:
                raise DataError(
                    f"{what} It is damaged sample number {len(self._known)} of this process, and "
                    f"data.max_damaged={self._max_damaged} may be replaced."
                )
            tqdm.write(f"warning: another sample takes the place of a damaged one. {what}", file=sys.stderr)
