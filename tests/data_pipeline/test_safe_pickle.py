"""Pickles are read as data; one that wants to act is refused before it does."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.safe_pickle import load_pickle


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
        "labels": [1, 2, 3], "nested": ({"x": b"bytes"}, None, 1.5, True),
    }  # fmt: skip
    if protocol == 5:
        value["data"] = value["mean"] = None  # NumPy asks for other names there; data sets of this kind are older
    found = load_pickle(pickle.dumps(value, protocol), where="test")
    assert found.keys() == value.keys()
    assert found["nested"] == value["nested"]
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


def test_damaged_pickle_is_told() -> None:
    content = pickle.dumps({"data": np.zeros(100, np.uint8)}, 2)
    for damaged in (content[:60], b"", b"<html>not found</html>", content.replace(b"data", b"d\xff\xfe")[:-20]):
        with pytest.raises(DataError, match="test is damaged or no pickle"):
            load_pickle(damaged, where="test")
