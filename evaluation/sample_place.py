"""Where samples are written, whether they are there, and what may be replaced."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import fsync_file
from data_pipeline.manifest import FILE_NAME, SAMPLES, Manifest


@dataclass(frozen=True)
class Place:
    """Where the results lie: an npz with a grid and an account beside it, or a folder with all three in it."""

    out: Path

    @property
    def is_folder(self) -> bool:
        return not self.out.suffix

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """Images (of a folder, the file that says they are there), grid, account."""
        if self.is_folder:
            return self.out / FILE_NAME, self.out / "grid.png", self.out / "account.json"
        return self.out, self.out.with_suffix(".png"), self.out.with_suffix(".json")

    @property
    def account(self) -> Path:
        """Written last: with it, all is there."""
        return self.files[2]

    @property
    def chunks(self) -> Path:
        """What is being made; removed at the end."""
        return self.out.parent / f".{self.out.name}.chunks"

    def check(self) -> None:
        """Raises UserError where the results could not be written."""
        if self.out.name in ("", ".."):
            raise UserError(f"--out {self.out} has no name of its own: name a folder, or a file samples.npz, in it.")
        if self.out.suffix not in ("", ".npz"):
            raise UserError(f"--out {self.out} must end in .npz, or be the name of a folder, without a suffix.")
        for path in self.files:
            if path.is_dir():
                raise UserError(f"--out {self.out}: {path} is a folder; name a file that is to be made.")
        above = next(folder for folder in self.out.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"--out {self.out}: {above} is a file, not a folder.")
        if self.is_folder and self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; add .npz, or name a folder that is to be made.")

    def holds(self, key: str) -> bool:
        """Whether the images of this key are there, complete."""
        try:
            found = json.loads(self.account.read_text())
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and found.get("key") == key and all(path.exists() for path in self.files)

    def make_room(self, key: str, *, overwrite: bool) -> None:
        """See that nothing dear is replaced. Raises UserError for what may not be, or was not asked to be."""
        if not overwrite and not (self.chunks / key).exists():  # with these, the job began with leave to write
            there = [path for path in self.files if path.exists()]
            if self.is_folder and self.out.exists() and any(self.out.iterdir()):
                there = [self.out]
            if there:
                raise UserError(
                    f"--out {self.out}: {there[0]} exists; give another name, or --overwrite to replace it."
                )
        if self.is_folder and self.out.exists() and any(self.out.iterdir()) and not self._is_of_samples():
            raise UserError(f"--out {self.out} holds other things than samples: name a folder that is to be made.")

    def replace_images(self, made: Path) -> None:
        """Move an npz, complete on the same disk, to its place; the account that is there tells of another's images."""
        self.account.unlink(missing_ok=True)
        made.replace(self.out)
        fsync_file(self.out.parent)

    def _is_of_samples(self) -> bool:
        return (self.out / FILE_NAME).exists() and Manifest.load(self.out).source.kind == SAMPLES

    def remove_chunks(self) -> None:
        shutil.rmtree(self.chunks, ignore_errors=True)
