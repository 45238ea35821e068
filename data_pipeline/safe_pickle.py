"""Reads data sets that were published as pickles, without executing them.

A pickle is a program that may call any function by name. Here only the few names that a NumPy array needs are
known, and they are bound to small stand-ins of our own: no foreign code runs, and NumPy's own unpickling,
which trusts what it is given, is not used either. Anything else is refused.

`load_pickle` reads bytes into memory; `map_pickle` leaves the large arrays of a file where they lie.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

_LONG = 1 << 20  # bytes that are worth mapping
_DTYPES = {"u1": np.dtype(np.uint8), "f4": np.dtype(np.float32), "f8": np.dtype(np.float64), "i8": np.dtype(np.int64)}
_SCALARS = (str, bytes, bool, int, float, type(None))


def load_pickle(content: bytes, *, where: str) -> dict[Any, Any]:
    """The dictionary in a pickle: of strings, numbers, lists of them, and arrays; Python 2 strings come as str.

    Raises:
        DataError: the pickle asks for anything beyond that, or is damaged; `where` names it in the message.
    """
    return _loaded(_Unpickler(io.BytesIO(content), encoding="latin1"), where)


def map_pickle(path: Path) -> dict[Any, Any]:
    """Like `load_pickle`, but arrays of a megabyte or more are mapped read-only: their rows are read when asked for.

    (Where an old protocol wrote an array as text, it is read into memory.)

    Raises:
        DataError: as for `load_pickle`.
    """
    with open(path, "rb") as file:
        return _loaded(_MappingUnpickler(_Reader(path, file), encoding="latin1"), str(path))


def _loaded(unpickler: Any, where: str) -> dict[Any, Any]:
    try:
        return _flat(unpickler.load())
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
        if isinstance(content, _Stretch):
            self.value = content.mapped(dtype.dtype, shape, fortran_order)
            return
        raw = content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote bytes as str
        self.value = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


# Not functions: a pickle may set attributes of what it is given, and these have none.
class _Reconstruct:
    """Stands in for numpy.core.multiarray._reconstruct."""

    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _Encode:
    """Stands in for codecs.encode: how Python 3 writes bytes under the old protocols."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"bytes encoded as {encoding}")
        return text.encode("latin1")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode(),
}


class _Admitting:
    """An unpickler's view of the world."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


class _Unpickler(_Admitting, pickle.Unpickler):
    pass


class _Stretch(NamedTuple):  # a tuple: nothing in a pickle can change it
    """Bytes that were left in the file; takes the place of the bytes object in what is unpickled."""

    path: Path
    offset: int
    size: int

    def decode(self, *_: Any) -> _Stretch:
        """Python 2 wrote bytes as str, which the unpickler would decode."""
        return self

    def mapped(self, dtype: np.dtype[Any], shape: tuple[int, ...], fortran_order: bool) -> NDArray[Any]:
        flat = np.memmap(self.path, dtype, mode="r", offset=self.offset, shape=(self.size // dtype.itemsize,))
        return flat.view(np.ndarray).reshape(shape, order="F" if fortran_order else "C")

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class _Reader:
    """A pickle's file, whose long stretches of bytes are passed over."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._num_bytes = path.stat().st_size

    def read(self, size: int) -> Any:
        if size < _LONG:
            return self.read_whole(size)
        start = self._file.tell()
        if start + size > self._num_bytes:
            raise EOFError(f"it ends {start + size - self._num_bytes:,} bytes too early")
        self._file.seek(size, io.SEEK_CUR)
        return _Stretch(self._path, start, size)

    def readline(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends too early")
        return line

    def read_whole(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) != size:
            raise EOFError("it ends too early")
        return content


class _MappingUnpickler(_Admitting, pickle._Unpickler):  # the one in Python: the one in C insists on bytes
    def __init__(self, reader: _Reader, *, encoding: str) -> None:
        super().__init__(reader, encoding=encoding)
        self._reader = reader

    def _pass_frame(self: Any) -> None:
        self._reader.read_whole(8)  # frames say how much to read ahead: nothing

    def _load_text(self: Any) -> None:
        (size,) = struct.unpack("<I", self._reader.read_whole(4))
        self.append(str(self._reader.read_whole(size), "utf-8", "surrogatepass"))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.FRAME[0]: _pass_frame,
        pickle.BINUNICODE[0]: _load_text,
    }


def _flat(content: Any) -> dict[Any, Any]:
    """The dictionary in a pickle, with the arrays in place of their stand-ins.

    Nothing deeper: in a pickle of a few bytes, lists that hold each other twice can stand for more than any memory.
    What several keys share is looked at once.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds no dictionary but a {type(content).__name__}")
    values = {id(value): value for value in content.values()}
    plain = {number: _plain(value) for number, value in values.items()}
    return {key: plain[id(value)] for key, value in content.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Stretch):
        return value.read()
    items = value if isinstance(value, (list, tuple)) else [value]
    strange = next((item for item in items if not isinstance(item, _SCALARS)), None)
    if strange is not None:
        raise ValueError(f"a {type(strange).__name__} within a {type(value).__name__}")
    return value
