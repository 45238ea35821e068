"""Sends what is new in a run or study folder to its mirror, so that the mirror, too, is a folder to go on from at any
moment: a checkpoint is complete there or not at all, and what says that something is done comes after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from data_pipeline.errors import UserError
from trainer.mirror_files import MANIFEST, Cursor, Part, file_mark, local_names, manifest_entries, number, parts_of
from trainer.mirror_sender import Sender
from trainer.mirror_store import MirrorStore, StorageError, Stored


class Push:
    """One folder and one mirror of it. Errors of the storage are StorageErrors; the next pass then goes on.

    `advance` hears of bytes sent, `say` of what is left out.
    """

    def __init__(
        self, folder: Path, store: MirrorStore, cursor: Cursor,
        *, advance: Callable[[int], object] = lambda num_bytes: None, say: Callable[[str], object] = print,
    ) -> None:  # fmt: skip
        self.folder, self.store, self.cursor = folder, store, cursor
        self.refused: list[str] = []  # why runs were left out, of the last pass
        self._sender = Sender(folder, store, cursor, advance=advance, say=say)
        self._is_listed = False
        self._checked: set[str] = set()  # sealed folders that were compared with the mirror
        self._cleaned: dict[str, list[str]] = {}  # by part: the sealed folders here when old ones were removed there

    @property
    def num_incomplete(self) -> int:
        """Files and folders that could not be read whole in the last pass."""
        return self._sender.num_incomplete

    # ---- a pass -------------------------------------------------------------------------------------------------

    def one_pass(self, *, everything: bool) -> bool:
        """Send what is new; `everything`: growing files too, however short ago they were sent.

        Returns whether the folder is a run that is finished, and all of it in the mirror.
        """
        self.refused, self._sender.num_incomplete = [], 0
        try:
            self._list()
            parts = parts_of(local_names(self.folder))
            root = parts[""]
            is_finished = "result.json" in root.plain
            everything = everything or is_finished
            welcome = [part for part in parts.values() if self._is_welcome(part)]
            if root in welcome:
                self._retract({part.prefix: part for part in welcome})
                self._send_early(root, everything)
                for part in welcome[1:]:
                    self._send_early(part, everything)
                    self._send_rest(part, everything)
                self._send_rest(root, everything)
                self._remove_old(welcome)
        except StorageError:
            self._is_listed = False  # who knows what has arrived
            raise
        finally:
            self.cursor.save()
        return is_finished and not self.refused and not self.num_incomplete

    def num_bytes(self) -> int:
        """What a pass would send."""
        self._list()
        total = 0
        for part in parts_of(local_names(self.folder)).values():
            names = {name: self._size(name) for name in part.plain}
            for folder in self._unsent(part):
                entries = manifest_entries(self._sender.path(f"{folder}/{MANIFEST}").read_bytes()) or {}
                names |= {f"{folder}/{name}": entry["bytes"] for name, entry in entries.items()}
            total += sum(size for name, size in names.items() if self._sender.lacks(name))
        return total

    def _list(self) -> None:
        if not self._is_listed:
            self._sender.there = self.store.list()
            self._checked.clear()
            self._is_listed = True

    def _size(self, name: str) -> int:
        try:
            return self._sender.path(name).stat().st_size
        except FileNotFoundError:
            return 0

    def _send_early(self, part: Part, everything: bool) -> None:
        """Records before checkpoints: a run that goes on from the mirror's newest then misses none."""
        self._sender.send(part.early, everything=everything or bool(self._unsent(part)))

    def _send_rest(self, part: Part, everything: bool) -> None:
        for folder in self._unsent(part):
            self._send_sealed(folder)
        self._sender.send(part.late, everything=everything)

    # ---- whose mirror it is -------------------------------------------------------------------------------------

    def _is_welcome(self, part: Part) -> bool:
        """Whether the mirror has no other run in this place. Where it has none, it gets the run's id, first of all."""
        if part.identity not in part.plain:
            return True
        try:
            about = json.loads(self._sender.path(part.identity).read_bytes())
            run = str(about["id"])
        except (OSError, ValueError, KeyError, TypeError):
            self.refused.append(f"{self.folder / part.identity} is damaged: remove it, and the run gets a new id")
            return False
        if part.identity not in self._sender.there:
            about.pop("saved_images", None)  # that follows when a checkpoint is there
            self._sender.write(part.identity, (json.dumps(about, indent=2) + "\n").encode())
            self.cursor.forget(part.identity)
        elif self.cursor.runs.get(part.prefix) != run and self._run_there(part) != run:
            self.refused.append(
                f"{self.store}/{part.prefix} holds another run than {self.folder / part.prefix} (the ids in run.json "
                "differ); give this one another address, or move the other away"
            )
            return False
        self.cursor.runs[part.prefix] = run
        return True

    def _run_there(self, part: Part) -> str | None:
        try:
            return str(json.loads(self.store.read(part.identity))["id"])
        except (ValueError, KeyError, TypeError):
            return None

    def _retract(self, parts: dict[str, Part]) -> None:
        """Remove what this folder sent and the run has withdrawn: a result that a larger budget made void, say."""
        for name in list(self.cursor.marks):
            part = parts.get(Part.prefix_of(name))
            # Where the run's id is gone, the whole folder may be (a disk that is not mounted): nothing follows.
            may = part is not None and part.identity in part.plain and part.may_withdraw(name)
            if may and not self._sender.path(name).exists():
                self._sender.remove(name)

    # ---- checkpoints and exports --------------------------------------------------------------------------------

    def _unsent(self, part: Part) -> list[str]:
        """The sealed folders that the mirror lacks, the newest first."""
        return [folder for folder in part.complete if not self._is_complete_there(folder)]

    def _is_complete_there(self, folder: str) -> bool:
        manifest, there = f"{folder}/{MANIFEST}", self._sender.there
        try:
            mark = file_mark(self._sender.path(manifest))
            if manifest not in there:
                return False
            is_known = self.cursor.marks.get(manifest) == mark
            if is_known and folder in self._checked:
                return True
            content = self._sender.path(manifest).read_bytes()
        except FileNotFoundError:
            return True  # removed since it was listed: nothing to send
        entries = manifest_entries(content) or {}
        if any(there.get(f"{folder}/{name}", Stored(-1)).size != entry["bytes"] for name, entry in entries.items()):
            return False
        if not is_known and self.store.read(manifest) != content:
            return False
        self._note_complete(folder, mark, entries)
        return True

    def _note_complete(self, folder: str, mark: list[int], names: Iterable[str]) -> None:
        for name in names:  # the manifest stands for them
            self.cursor.forget(f"{folder}/{name}")
        self.cursor.note(f"{folder}/{MANIFEST}", mark)
        self._checked.add(folder)

    def _send_sealed(self, folder: str) -> None:
        """File by file, the manifest last; the run may remove it meanwhile."""
        manifest = f"{folder}/{MANIFEST}"
        try:
            mark, content = file_mark(self._sender.path(manifest)), self._sender.path(manifest).read_bytes()
            entries = manifest_entries(content)
            if entries is None:
                return self._sender.leave_out(folder, "its manifest is damaged")
            if manifest in self._sender.there:  # of another checkpoint of this name
                self._sender.remove(manifest)
            for name, entry in entries.items():
                problem = self._sender.send_listed(f"{folder}/{name}", entry)
                if problem:
                    return self._sender.leave_out(folder, f"{name} {problem}")
            if file_mark(self._sender.path(manifest)) != mark:
                return self._sender.leave_out(folder, "it changed while it was sent")
            self._sender.write(manifest, content)
            return self._note_complete(folder, mark, entries)
        except FileNotFoundError:
            return None  # removed by the run, which has newer ones
        except OSError as error:
            return self._sender.leave_out(folder, str(error))

    def _remove_old(self, parts: list[Part]) -> None:
        """Remove checkpoints that the run has removed, by its own rule, once the mirror has a newer one of its."""
        changed = [part for part in parts if self._cleaned.get(part.prefix) != part.complete]
        there = parts_of(self._sender.there) if changed else {}
        for part in changed:
            if part.prefix in there:
                self._remove_old_of(part, there[part.prefix])
            self._cleaned[part.prefix] = part.complete

    def _remove_old_of(self, part: Part, there: Part) -> None:
        checkpoints = f"{part.prefix}checkpoints/"
        complete = [int(number(f)) for f in there.complete if f.startswith(checkpoints)]
        here = {int(number(f)) for f in part.complete if f.startswith(checkpoints)}
        newest = max(here.intersection(complete), default=None)
        if newest is None:
            return
        stay = self._to_stay(part, complete)
        for folder, names in there.sealed.items():
            nimg = int(number(folder))
            if not folder.startswith(checkpoints) or nimg in stay or nimg >= newest:
                continue
            if not self._sender.path(folder).exists():
                manifest = f"{folder}/{MANIFEST}"
                for name in sorted(names, key=lambda name: (name != manifest, name)):  # from then on it is none
                    self._sender.remove(name)

    def _to_stay(self, part: Part, complete: list[int]) -> set[int]:
        """Of the mirror's complete checkpoints, those that the run would keep: all where its config does not say."""
        try:
            train = yaml.safe_load(self._sender.path(f"{part.prefix}config.yaml").read_text())["train"]
            keep, every = int(train["keep_checkpoints"]), train.get("keep_every_images")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            return set(complete)
        stay = set(sorted(complete, reverse=True)[:keep])
        if every:
            from trainer.checkpoint import kept_for_good  # here, as it brings torch and DeepSpeed

            stay |= kept_for_good(complete, int(every))
        return stay


def check_apart(folder: Path, store: MirrorStore) -> None:
    """Raises UserError where the mirror lies in the folder or the folder in it: it would mirror itself."""
    root, folder = store.local_root, folder.resolve()
    if root is not None and (root.resolve().is_relative_to(folder) or folder.is_relative_to(root.resolve())):
        raise UserError(f"the mirror {store} and the folder {folder} lie in each other; choose another address.")
