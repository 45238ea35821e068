"""A small disk of its own for a study, that can be filled to the last byte and freed again (Linux; needs root)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

_BLOCK = 1 << 20


class SmallDisk:
    """A file system in memory, mounted on a folder."""

    def __init__(self, path: Path, *, megabytes: int) -> None:
        """Raises OSError, saying why, where mounting is not permitted."""
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise OSError(error.stderr.strip()) from None
        self._path, self._ballast = path, path / ".ballast"

    def fill(self) -> int:
        """Leave no byte free. Returns how many were."""
        written = 0
        with open(self._ballast, "wb", buffering=0) as file:
            for size in (_BLOCK, 4096, 1):
                with contextlib.suppress(OSError):  # it is full: that is what is wanted
                    while True:
                        written += file.write(bytes(size))
        return written

    def is_full(self) -> bool:
        return os.statvfs(self._path).f_bavail == 0

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        self.free()
        subprocess.run(["umount", "--lazy", str(self._path)], capture_output=True, check=False)
