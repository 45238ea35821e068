"""What a photo of ImageNet's validation set shows: from the official development kit, or from a list of file names."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

WNID = re.compile(r"n\d{8}")  # a WordNet id
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"


@dataclass(frozen=True)
class ValidationLabels:
    """Classes of the validation photos."""

    origin: str  # the file's name
    wnids: dict[str, str]  # by the photo's name, without extension
    words: dict[str, str]  # human names by WordNet id; empty where the file has none

    def wnid(self, photo: str) -> str:
        """The class of a photo.

        Raises:
            DataError: it has none.
        """
        stem = photo.rpartition("/")[2].partition(".")[0]
        try:
            return self.wnids[stem]
        except KeyError:
            raise DataError(
                f"{self.origin} has no label for {photo} ({len(self.wnids):,} labels): they do not belong together."
            ) from None


def read_labels(path: Path) -> ValidationLabels:
    """The labels in the development kit (ILSVRC2012_devkit_t12.tar.gz or its folder) or in a text or CSV file.

    Lines of a text file are "FILE WNID", those of a CSV file "FILE,WNID ..." as in Kaggle's LOC_val_solution.csv.

    Raises:
        DataError: it is none of these, or damaged.
    """
    if path.is_dir():
        members = {file.name: file.read_bytes() for file in path.rglob("*") if file.name in (_GROUND_TRUTH, _META)}
        return _from_devkit(path, members)
    if not path.is_file():
        raise DataError(f"--devkit {path}: there is no such file or folder.")
    if path.suffix in (".txt", ".csv"):
        return _from_list(path)
    try:
        with tarfile.open(path) as tar:
            files = {entry.name.rpartition("/")[2]: entry for entry in tar if entry.isreg()}
            wanted = {name: tar.extractfile(files[name]) for name in (_GROUND_TRUTH, _META) if name in files}
            return _from_devkit(path, {name: file.read() for name, file in wanted.items() if file})
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"--devkit {path} is damaged or no tar archive ({error}): get it again.") from None


def _from_devkit(path: Path, members: dict[str, bytes]) -> ValidationLabels:
    for name in (_GROUND_TRUTH, _META):
        if name not in members:
            raise DataError(
                f"--devkit {path} holds no {name}: expected the development kit of tasks 1 and 2 "
                "(ILSVRC2012_devkit_t12.tar.gz), its folder, or a .txt or .csv file of labels."
            )
    synsets = _synsets(path, members[_META])
    try:
        truth = [int(line) for line in members[_GROUND_TRUTH].split()]
        wnids = {f"ILSVRC2012_val_{row:08d}": synsets[number][0] for row, number in enumerate(truth, 1)}
    except (ValueError, KeyError) as error:
        raise DataError(f"--devkit {path}: {_GROUND_TRUTH} names class {error}, unknown to {_META}.") from None
    return ValidationLabels(path.name, wnids, dict(synsets.values()))


def _synsets(path: Path, content: bytes) -> dict[int, tuple[str, str]]:
    """(WordNet id, words) by the kit's own class number; inner nodes of the hierarchy, which have children, are not."""
    from scipy.io import loadmat  # slow to import; it reads data, MATLAB code is never run

    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"].reshape(-1)
        return {
            int(entry["ILSVRC2012_ID"]): (str(entry["WNID"]), str(entry["words"]))
            for entry in synsets
            if int(entry["num_children"]) == 0
        }
    except Exception as error:  # a damaged file can fail in any way
        raise DataError(f"--devkit {path}: {_META} is damaged or of another kind ({error!r}).") from None


def _from_list(path: Path) -> ValidationLabels:
    wnids = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = re.split(r"[,\s]+", line.strip())
        if len(words) >= 2 and WNID.fullmatch(words[1]):
            wnids[words[0].rpartition("/")[2].partition(".")[0]] = words[1]
        elif line.strip() and number > 1:  # the first line may be a heading
            raise DataError(
                f"--devkit {path}, line {number}: expected a file name and a WordNet id such as n01440764, "
                f"found {line[:60]!r}. Class numbers differ between code bases and are not taken."
            )
    if not wnids:
        raise DataError(f"--devkit {path} names no labels: expected lines of a file name and a WordNet id.")
    return ValidationLabels(path.name, wnids, {})
