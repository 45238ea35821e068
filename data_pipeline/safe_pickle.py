"""Reads data sets that were published as pickles, without executing them.

A pickle is a program that may call any function by name. Here only the four names that a NumPy array needs are
known, and they are bound to small stand-ins of our own: no foreign code runs, and NumPy's own unpickling,
which trusts what it is given, is not used either. Anything else is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

_DTYPES = {"u1": np.dtype(np.uint8), "f4": np.dtype(np.float32), "f8": np.dtype(np.float64), "i8": np.dtype(np.int64)}


def load_pickle(content: bytes, *, where: str) -> Any:
    """The dictionaries, lists, strings, numbers and arrays in a pickle; Python 2 strings come as str.

    Raises:
        DataError: the pickle asks for anything beyond that, or is damaged; `where` names it in the message.
    """
    try:
        return _resolved(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    except _RefusedError as error:
        raise DataError(f"{where} asks for {error}, which no data file needs: refused. It may be malicious.") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{where} is damaged or no pickle of plain data: {error!r}") from None


class _RefusedError(Exception):
    """A name that is not on the list."""


class _Dtype:
    """Stands in for numpy.dtype: one of a few plain little-endian types."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = _DTYPES[code]

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            raise ValueError("big-endian arrays are not supported")


class _Array:
    """Stands in for numpy.ndarray: holds the array once its state has come."""

    value: NDArray[Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, content = state
        raw = content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote bytes as str
        self.value = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes under the old protocols."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _resolved(value: Any) -> Any:
    """`value` with the arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _resolved(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolved(item) for item in value)
    return value
