"""Pickles are read as data; one that wants to act is refused before it does."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.safe_pickle import load_pickle, map_pickle


class Malicious:
    """What an attacker would send: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_numpy_wrote(protocol: int) -> None:
    value = {
        "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "mean": np.asfortranarray(np.linspace(0, 1, 6).reshape(2, 3)),
        "labels": [1, 2, 3], "mixed": (b"bytes", None, 1.5, True),
    }  # fmt: skip
    if protocol == 5:
        value["data"] = value["mean"] = None  # NumPy asks for other names there; data sets of this kind are older
    found = load_pickle(pickle.dumps(value, protocol), where="test")
    assert found.keys() == value.keys()
    assert found["mixed"] == value["mixed"]
    np.testing.assert_array_equal(found["data"], value["data"])
    np.testing.assert_array_equal(found["mean"], value["mean"])


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    content = pickle.dumps({"data": Malicious(f"touch {trace}")}, protocol)
    with pytest.raises(DataError, match=r"data_batch_1 asks for (posix|nt).system.*refused"):
        load_pickle(content, where="data_batch_1")
    assert not trace.exists()
    pickle.loads(content)  # the proof that it would have
    assert trace.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile", "os.path.join"])
def test_every_other_name_is_refused(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(DataError, match=f"asks for {name}"):
        load_pickle(f"c{module}\n{attribute}\n.".encode(), where="test")


def test_objects_hidden_in_an_array_are_refused() -> None:
    content = pickle.dumps(np.array([{"a": 1}], dtype=object), 2)
    with pytest.raises(DataError, match="damaged or no pickle of plain data"):
        load_pickle(content, where="test")


def test_lists_that_hold_each_other_are_refused_at_once() -> None:
    """In 24 levels they would stand for 16 million numbers; in 60, for more than there is time."""
    value: list[Any] = [1, 2]
    for _ in range(60):
        value = [value, value]
    recursive: list[Any] = []
    recursive.append(recursive)
    for labels in (value, recursive):
        with pytest.raises(DataError, match="a list within a list"):
            load_pickle(pickle.dumps({"labels": labels}), where="test")


def test_what_keys_share_is_given_to_each() -> None:
    labels, data = [1, 2], np.arange(3.0)
    found = load_pickle(pickle.dumps({"a": labels, "b": labels, "c": data, "d": data}, 3), where="test")
    assert found["a"] == found["b"] == labels
    np.testing.assert_array_equal(found["d"], data)


@pytest.mark.parametrize("name", ["_codecs encode", "numpy.core.multiarray _reconstruct", "numpy ndarray"])
@pytest.mark.parametrize("state", [{"__defaults__": ("x",)}, (None, {"__defaults__": ("x",)}), (None, {"value": 1})])
def test_stand_ins_cannot_be_changed(name: str, state: Any) -> None:
    target = "c" + name.replace(" ", "\n") + "\n"
    content = b"\x80\x02" + target.encode() + pickle.dumps(state, 2)[2:-1] + b"b."
    with pytest.raises(DataError, match=r"damaged or no pickle of plain data: (Attribute|Type)Error"):
        load_pickle(content, where="test")
    test_reads_what_numpy_wrote(2)


def test_damaged_pickle_is_told() -> None:
    content = pickle.dumps({"data": np.zeros(100, np.uint8)}, 2)
    for damaged in (content[:60], b"", b"<html>not found</html>", content.replace(b"data", b"d\xff\xfe")[:-20]):
        with pytest.raises(DataError, match="test is damaged or no pickle"):
            load_pickle(damaged, where="test")


@pytest.mark.parametrize("protocol", range(5))
def test_mapped_is_what_is_loaded(tmp_path: Path, protocol: int) -> None:
    large = np.random.default_rng(0).integers(0, 256, (1100, 1000), dtype=np.uint8)
    value = {"data": large, "turned": large.T, "mean": np.arange(3.0), "labels": [1, 2], "blob": bytes(2 << 20)}
    (tmp_path / "batch").write_bytes(pickle.dumps(value, protocol))
    found = map_pickle(tmp_path / "batch")
    assert found.keys() == value.keys()
    for name in ("data", "turned", "mean"):
        np.testing.assert_array_equal(found[name], value[name])
        assert found[name].dtype == value[name].dtype
    assert (found["labels"], found["blob"]) == (value["labels"], value["blob"])
    mapped = isinstance(getattr(found["data"].base, "base", None), np.memmap) or isinstance(
        found["data"].base, np.memmap
    )
    assert mapped == (protocol >= 3)  # earlier ones write bytes as text
    assert not (mapped and found["data"].flags.writeable)


def test_mapped_python_2_pickle(tmp_path: Path) -> None:
    """Python 2 wrote the bytes of an array as a string."""
    large = np.random.default_rng(0).integers(0, 256, (2, 1 << 20), dtype=np.uint8)
    content = pickle.dumps({"data": large}, 3)
    size = struct.pack("<I", large.size)
    at = content.index(b"B" + size + large[0, :16].tobytes())
    (tmp_path / "batch").write_bytes(b"\x80\x02" + content[2:at] + b"T" + content[at + 1 :])
    np.testing.assert_array_equal(map_pickle(tmp_path / "batch")["data"], large)


@pytest.mark.parametrize("protocol", range(6))
def test_mapping_executes_nothing(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": Malicious(f"touch {trace}")}, protocol))
    with pytest.raises(DataError, match=r"batch asks for (posix|nt).system.*refused"):
        map_pickle(tmp_path / "batch")
    assert not trace.exists()


def test_mapped_stretch_cannot_be_turned_to_another_file(tmp_path: Path) -> None:
    """A pickle may set the state of any object in it."""
    long = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
    for state in (b"}X\x04\0\0\0pathX\x0b\0\0\0/etc/passwds", b"N}X\x04\0\0\0pathX\x0b\0\0\0/etc/passwds\x86"):
        (tmp_path / "batch").write_bytes(b"\x80\x03" + long + state + b"b.")
        with pytest.raises(DataError, match="batch is damaged or no pickle of plain data"):
            map_pickle(tmp_path / "batch")


def test_mapped_pickle_that_was_cut_is_told(tmp_path: Path) -> None:
    content = pickle.dumps({"data": np.zeros((2 << 20,), np.uint8)}, 3)
    for kept in (40, 1 << 20, len(content) - 10):
        (tmp_path / "batch").write_bytes(content[:kept])
        with pytest.raises(DataError, match="batch is damaged or no pickle"):
            map_pickle(tmp_path / "batch")
