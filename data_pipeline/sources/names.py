"""File and folder names as text that can be stored: a name on disk is bytes, and need not be UTF-8."""

from __future__ import annotations


def printable(name: str) -> str:
    r"""A name as the file system gave it; bytes that are not UTF-8 are written out: "caf\xe9"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
