"""Reads and writes `.pt` files of weights: dictionaries of tensors as `torch.save` packs them. Nothing is executed."""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import fsync_file

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what float32 holds exactly


def read_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a plain state dict, on the CPU, mapped from the file where its layout allows it.

    A pickle is a program: only torch's restricted reader sees it, which knows tensors and plain containers.

    Raises:
        UserError: no such file; it is damaged, asks for code, or holds something else than named dense float tensors.
    """
    check_is_file(path)
    try:
        zipped = zipfile.is_zipfile(path)  # the layout since torch 1.6; the one before has no checksums
        damaged = _damaged_member(path) if zipped else None
        # Only the zip layout can be mapped; mapping is what keeps a large file out of memory.
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can fail in any way, even as EINVAL: a seek to nowhere
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise UserError(_refusal(path, error)) from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it fails its checksum; copy the file again from its source.")
    return _tensors(path, content)


def check_is_file(path: Path) -> None:
    """Raises UserError where there is no file."""
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a .pt file of weights.")


def write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain state dict, completely or not at all, without a copy of it in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(tensors), file)
        fsync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_file(path.parent)


def _damaged_member(path: Path) -> str | None:
    """The first member of the zip file that fails its checksum, which torch does not look at."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _refusal(path: Path, error: Exception) -> str:
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # how torch's reader names what it does not let in
    if asked:
        return (
            f"{path} asks for {asked[1]}, which weights do not need: refused, and nothing of it was run. It may be "
            "malicious, or hold a whole pickled object: save that object's state_dict() instead."
        )
    return f"{path} is damaged or no file of weights ({_short(error)}); copy it again from its source."


def _short(error: Exception) -> str:
    """The reason, without the advice that torch wraps it in."""
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict (names with tensors).")
    if "param_groups" in content:
        raise UserError(f"{path} is an optimizer's state, not weights; use the ema_*.pt or model*.pt file beside it.")
    tensors = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} holds {key!r}: {type(value).__name__}; expected a plain state dict of tensors.")
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in FLOATS:
            kind = f"{value.dtype} {value.layout} on {value.device}".replace("torch.", "")
            remedy = " Call .float() on each tensor and save the file again." if value.dtype == torch.float64 else ""
            raise UserError(f"{path}: {key} is {kind}; expected dense float32, float16 or bfloat16.{remedy}")
        tensors[key] = value.detach()
    return tensors
