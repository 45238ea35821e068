"""Tar archives: every file is found, and no archive ends silently before its end."""

from __future__ import annotations

import io
import tarfile

import pytest
from webdataset import TarWriter

from data_pipeline import tar
from data_pipeline.tar import CutTarError, DamagedTarError, Entry


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    archive.addfile(entry, io.BytesIO(content))


def made(kind: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive with all that is found in archives."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        add(archive, "cat", type=tarfile.DIRTYPE)
        add(archive, "cat/1.png", b"one")
        add(archive, "cat/link.png", type=tarfile.SYMTYPE, linkname="1.png")
        add(archive, f"cat/{'long' * 60}.png", b"two" * 300, mtime=1.5)
        add(archive, "cat/b\udce4r.png", b"three")
        add(archive, "dog/1.png", type=tarfile.LNKTYPE, linkname="cat/1.png")
        add(archive, "dog/2.png", b"")
    return buffer.getvalue()


def contents(archive: bytes) -> dict[str, bytes]:
    return {entry.name: archive[entry.offset :][: entry.size] for entry in tar.walk(io.BytesIO(archive))}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_file_is_found_where_it_lies(kind: int) -> None:
    found = contents(made(kind))
    with tarfile.open(fileobj=io.BytesIO(made(kind))) as archive:
        wanted = {one.name: archive.extractfile(one).read() for one in archive if one.isreg() or one.islnk()}
    assert found == wanted
    assert found["dog/1.png"] == b"one"
    assert len(found) == 5


def test_an_archive_inside_another() -> None:
    content = made()
    found = list(tar.walk(io.BytesIO(b"x" * 700 + content + b"y" * 700), 700, 700 + len(content)))
    assert found == [entry._replace(offset=entry.offset + 700) for entry in tar.walk(io.BytesIO(content))]


@pytest.mark.parametrize("size", [0, 1, 512, 300_000])
def test_what_we_write_is_what_webdataset_writes(size: int) -> None:
    theirs = io.BytesIO()
    with TarWriter(theirs, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        writer.write({"__key__": "000000001", "png": bytes(range(1, 251)) * (size // 250) + bytes(size % 250)})
    content = contents(theirs.getvalue())["000000001.png"]
    ours = tar.header("000000001.png", size) + content + tar.padding(size)
    assert ours + tar.end_mark(len(ours)) == theirs.getvalue()


def test_no_header_is_damaged_unnoticed() -> None:
    content = made()
    wanted = list(tar.walk(io.BytesIO(content)))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        headers = [member.offset for member in archive]
    for header in headers:
        for at in range(header, header + tar.BLOCK, 3):
            damaged = bytearray(content)
            damaged[at] ^= 1
            try:
                assert list(tar.walk(io.BytesIO(damaged))) == wanted  # the filling of the checksum's own field
                assert header + 148 <= at < header + 156
            except DamagedTarError:
                pass


def test_no_cut_is_unnoticed() -> None:
    content = made()
    end = len(content.rstrip(b"\0")) // tar.BLOCK * tar.BLOCK + tar.BLOCK  # of the last header
    for keep in (*range(0, end + 1, tar.BLOCK), *range(100, end, 700)):
        with pytest.raises(DamagedTarError):
            list(tar.walk(io.BytesIO(content[:keep])))
    assert len(list(tar.walk(io.BytesIO(content[: end + tar.BLOCK])))) == 5


def test_what_lies_behind_the_end_is_not_lost() -> None:
    content = made()
    with pytest.raises(DamagedTarError, match="more behind its end mark"):
        list(tar.walk(io.BytesIO(content + content)))
    hole = bytearray(content)
    hole[tar.BLOCK : 2 * tar.BLOCK] = bytes(tar.BLOCK)
    with pytest.raises(DamagedTarError, match="more behind its end mark"):
        list(tar.walk(io.BytesIO(hole)))


@pytest.mark.parametrize("size", [2**62, -1, -512])
def test_impossible_sizes(size: int) -> None:
    entry = tarfile.TarInfo("1.png")
    entry.size = size
    with pytest.raises(DamagedTarError, match=r"it ends before '1.png' does|impossible size"):
        list(tar.walk(io.BytesIO(entry.tobuf(tarfile.GNU_FORMAT) + bytes(20 * tar.BLOCK))))


def test_a_hard_link_to_what_is_not_there() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        add(archive, "1.png", type=tarfile.LNKTYPE, linkname="0.png")
    with pytest.raises(DamagedTarError, match=r"'1.png' is a hard link to '0.png', which is not before it"):
        list(tar.walk(buffer))


def test_cut_short_is_told_apart() -> None:
    with pytest.raises(CutTarError, match=r"ends before 'a' does, of 600 bytes"):
        list(tar.walk(io.BytesIO(tar.header("a", 600) + bytes(300))))
    assert list(tar.walk(io.BytesIO(tar.header("a", 0) + tar.end_mark(512)))) == [Entry("a", 512, 0)]
