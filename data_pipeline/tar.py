"""Tar archives: the one walk over their headers, and the header that we write.

Python's tarfile takes an invalid header for the end of the archive, unless it is the first one. Here an archive ends
at its end mark, a block of zeros with nothing but zeros behind it, and at nothing else.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512  # bytes: a header is one block, contents are padded to whole blocks
_RECORD = 20 * BLOCK  # an archive's size is a multiple of it
_READ_BYTES = 1 << 20
# POSIX.1-1988 (ustar): name, mode, user, group, size, time, checksum, type, link target, magic and version, names of
# user and group, device, prefix of the name.
_USTAR = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_CHECKSUM = slice(148, 156)
_PLAIN = (b"0ustar\x0000", bytes(155))  # type, magic and version of a regular file's header; no prefix


class DamagedTarError(ValueError):
    """It is no plain tar archive, or damaged."""


class CutTarError(DamagedTarError):
    """It is cut short."""


class Entry(NamedTuple):
    """A file in an archive."""

    name: str  # bytes that are not UTF-8 as lone surrogates (surrogateescape)
    offset: int  # bytes, of its content in the file that was walked
    size: int  # bytes


def header(name: str, size: int) -> bytes:
    """The header of a regular file with no times and no owner."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100
    assert size < 8**11
    zero = b"0000000\0"
    block = bytearray(
        _USTAR.pack(
            encoded, b"0000644\0", zero, zero, b"%011o\0" % size, b"00000000000\0", b" " * 8, b"0", b"",
            b"ustar\x0000", b"", b"", b"", b"", b"",
        )
    )  # fmt: skip
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """What follows a content of `size` bytes."""
    return bytes(-size % BLOCK)


def end_mark(size: int) -> bytes:
    """What follows the last file of an archive of `size` bytes so far."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _RECORD)


def walk(file: BinaryIO | io.RawIOBase, start: int = 0, end: int | None = None) -> Iterator[Entry]:
    """The regular files of the archive at bytes start .. end (None: of the file), in order; hard links as their target.

    One small read and one seek a file; the caller may move the file's position between two.

    Raises:
        CutTarError: it is cut short.
        DamagedTarError: it is no plain tar archive, or damaged anywhere in its headers.
    """
    end = file.seek(0, os.SEEK_END) if end is None else end
    file.seek(start)
    try:
        rare = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DamagedTarError(str(error)) from None
    found: dict[str, Entry] = {}  # what hard links may refer to
    position = start
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK or position + BLOCK > end:
            raise CutTarError("it has no proper end")
        if not any(block):
            break
        entry = _plain_entry(block, position + BLOCK)
        if entry is None:
            file.seek(position)
            entry, position = _rare_entry(rare, found)
        else:
            position = entry.offset + entry.size + -entry.size % BLOCK
        if entry is None:
            continue
        if not 0 <= entry.size <= end - entry.offset:
            raise CutTarError(f"it ends before {entry.name!a} does, of {entry.size:,} bytes")
        found[entry.name] = entry
        yield entry
    _check_rest(file, position, end)


def _plain_entry(block: bytes, offset: int) -> Entry | None:
    """The file behind a header of the kind that most are, which needs no more than this; else None."""
    if (block[156:157] + block[257:265], block[345:500]) != _PLAIN:
        return None
    try:
        checksum = int(block[_CHECKSUM].strip(b" \0"), 8)
        size = int(block[124:136].strip(b" \0"), 8)
    except ValueError:
        return None
    if checksum != sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" "):
        return None
    return Entry(block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), offset, size)


def _rare_entry(tar: tarfile.TarFile, found: dict[str, Entry]) -> tuple[Entry | None, int]:
    """What tarfile makes of the header (and those that extend it) at its file's position, and where the next one is.

    None for a folder, a symbolic link and the like.
    """
    try:
        member = tarfile.TarInfo.fromtarfile(tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DamagedTarError(str(error)) from None
    if tar.offset <= member.offset:
        raise DamagedTarError(f"{member.name!a} has an impossible size")
    if member.issparse():
        raise DamagedTarError(f"{member.name!a} is stored with holes (sparse): unpack the archive")
    if member.islnk():
        if member.linkname not in found:
            raise DamagedTarError(f"{member.name!a} is a hard link to {member.linkname!a}, which is not before it")
        return found[member.linkname]._replace(name=member.name), tar.offset
    return (Entry(member.name, member.offset_data, member.size) if member.isreg() else None), tar.offset


def _check_rest(file: BinaryIO | io.RawIOBase, start: int, end: int) -> None:
    """Refuse what would be lost silently: archives joined by `cat`, or a header that zeros were written over."""
    file.seek(start)
    while block := file.read(min(_READ_BYTES, end - file.tell())):
        if any(block):
            raise DamagedTarError("there is more behind its end mark: it is damaged, or several archives in one")
