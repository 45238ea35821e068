"""What a folder of shards holds: the one file that says whether a data split is there and which it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.codec import Encoding
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic

FILE_NAME = "manifest.json"
FORMAT: Literal["image-shards/1"] = "image-shards/1"
SAMPLES = "samples"  # two kinds of source that no `prepare` knows: a trained network,
ADOPTED = "adopted"  # and tar shards that somebody else made

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainFileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # shards lie beside the manifest


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Part):
    """One tar file."""

    file: PlainFileName
    num_samples: int = Field(ge=1)
    num_bytes: int = Field(ge=1)
    sha256: Sha256


class SourceInfo(_Part):
    """Where the images came from."""

    kind: str  # the name under which `prepare` knows the source, or SAMPLES
    options: dict[str, str | int | float | bool]  # all that decides which images: equal options, equal images
    origin: str  # which archive or folder answered; for the reader only


class Manifest(_Part):
    """One split of a data set, as it lies in a folder."""

    format: Literal["image-shards/1"]
    name: str  # of the data set
    split: str  # "train" or "test"; "samples" of a network's images
    num_samples: int = Field(ge=1)
    image_size: int = Field(ge=1)  # pixels; images are square
    num_channels: Literal[3]
    num_classes: int = Field(ge=0)  # 0: unlabelled
    class_names: list[str]
    encoding: Encoding  # of the images in the shards, see codec.py
    preprocessing: str  # how originals became image_size x image_size, by name; "none" where they already were
    source: SourceInfo
    fingerprint: Sha256  # of pixels and labels, see fingerprint.py
    index_sha256: Sha256  # of index.npz
    shards: list[Shard]
    shards_at: str | None = None  # folder or URL of the shards where they do not lie beside the manifest

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        counted = sum(shard.num_samples for shard in self.shards)
        if counted != self.num_samples:
            raise ValueError(f"num_samples is {self.num_samples}, but the shards hold {counted}")
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but {len(self.class_names)} classes are named")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        return self

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically; it comes last, after the shards and the index."""
        write_atomic(folder / FILE_NAME, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder`.

        Raises:
            DataError: there is none, or it is not a valid one; says which field and what would be right.
        """
        try:
            content = (folder / FILE_NAME).read_bytes()
        except FileNotFoundError:
            raise DataError(_missing(folder)) from None
        return cls.parse(content, str(folder))

    @classmethod
    def parse(cls, content: bytes, place: str) -> Manifest:
        """The manifest in the bytes of its file; `place` is the folder or URL that it lies at.

        Raises:
            DataError: it is not a valid one; says which field and what would be right.
        """
        where = f"{place.rstrip('/')}/{FILE_NAME}"
        try:
            text = content.decode("utf-8")
            return cls.model_validate_json(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is damaged: {error}. {remedy(place)}") from None
        except ValidationError as error:
            found = re.search(r'"format":\s*"([^"]*)"', text)
            if found and found[1] != FORMAT:
                raise DataError(
                    f"{where}: format is '{found[1]}', this version reads '{FORMAT}'. {remedy(place)}"
                ) from None
            raise DataError(f"{where} is not a valid manifest: {_first_problem(error)}. {remedy(place)}") from None


def remedy(place: str | Path, source: SourceInfo | None = None) -> str:
    """What to do about a damaged split: the command that makes it anew."""
    if "://" in str(place):
        return f"Upload {place} anew from where it was prepared"
    folder = Path(place)
    out = folder.parent
    if source is not None and source.kind == ADOPTED:
        return f"Get the shards anew from where they came, then: python -m data_pipeline.adopt {folder}"
    if source is None:
        return f"Remove {out} and make it anew with python -m data_pipeline.prepare SOURCE --out {out}"
    options = ", ".join(f"{key}={value}" for key, value in source.options.items())
    if source.kind == SAMPLES:
        return f"Remove {folder} and make it anew with python -m evaluation.sample (it was made with {options})"
    if folder.name not in ("train", "test"):
        return f"Make it anew elsewhere with python -m data_pipeline.prepare {source.kind} --out OUT"
    command = f"python -m data_pipeline.prepare {source.kind} --out {out}"
    return f"Remove {out} and make it anew: {command}" + (f" (it was made with {options})" if options else "")


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        what = f"there is no folder {folder}"
    else:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}"))
        if splits:
            return f"{folder} is not one split but holds several: use {' or '.join(str(folder / s) for s in splits)}."
        what = f"{folder} holds no {FILE_NAME}, so it is no prepared data split"
    prepare, out = "python -m data_pipeline.prepare", f"--size SIZE --out {folder.parent}"
    return (
        f"{what}. Make one: {prepare} cifar10 --out data/cifar10, from your own images: {prepare} folder --from DIR "
        f"{out}, or, smaller, from a split that is there: {prepare} webdataset --from SPLIT --resize area {out}"
    )


def _first_problem(error: ValidationError) -> str:
    details: Any = error.errors()[0]
    where = ".".join(str(part) for part in details["loc"]) or "the file"
    return f"{where}: {details['msg']} (found {str(details['input'])[:80]!r})"
