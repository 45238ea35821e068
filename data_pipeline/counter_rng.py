"""Counter-based random numbers: every image of the training clock has its own, whoever draws them.

Image number n (the n-th image a run sees, counted from 0) gets numbers that are a pure function of
(seed, stream, n): Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by
(seed, stream) with the counter set by n. Any process may draw any slice of a batch and gets the same bits.

Images are drawn in chunks of `CHUNK` neighbours, one generator a chunk: no Python per image, and a process whose
slice cuts a chunk wastes at most `2 * (CHUNK - 1)` images' worth of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 16


class Stream(IntEnum):
    """One independent stream of numbers per purpose; the values are part of the format, never reuse one.

    5 was class dropout's, drawn in another way; 14 and 15 have never been drawn from.
    """

    ORDER = 1
    FLIP = 2
    TIMESTEP = 3
    NOISE = 4
    NLL_PLAN = 6
    NLL_NOISE = 7
    SAMPLE = 8
    GENERATED = 9
    CLASS_DROPOUT = 10
    STRATUM = 11
    KERNEL_SUBSET = 12
    SUBSTITUTE = 13
    ACCURACY_PLAN = 16
    ACCURACY_NOISE = 17
    LOW_RES_STEP = 18
    LOW_RES_NOISE = 19
    SAMPLE_LOW_RES = 20


def generator(seed: int, stream: Stream, block: int, *, part: int = 0) -> np.random.Generator:
    """The generator of one block (an image number, a chunk, an epoch: the caller says) of a stream.

    A block may have independent parts.
    """
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, part, block, 0], dtype=np.uint64)  # the lowest word counts the draws
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform(seed: int, stream: Stream, start: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) of the images start .. start + count - 1: [count]."""
    return _chunked(start, count, (), np.float64, lambda rng, out: rng.random(out=out), seed, stream)


def normal(seed: int, stream: Stream, start: int, count: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal numbers of the images start .. start + count - 1: [count, *shape], float32."""
    return _chunked(
        start, count, tuple(shape), np.float32,
        lambda rng, out: rng.standard_normal(out=out, dtype=np.float32), seed, stream,
    )  # fmt: skip


def _chunked(
    start: int, count: int, shape: tuple[int, ...], dtype: Any, fill: Any, seed: int, stream: Stream
) -> NDArray[Any]:
    first, last = start // CHUNK, -(-(start + count) // CHUNK)
    numbers = np.empty(((last - first) * CHUNK, *shape), dtype=dtype)
    for chunk in range(first, last):
        begin = (chunk - first) * CHUNK
        fill(generator(seed, stream, chunk), numbers[begin : begin + CHUNK])
    skip = start - first * CHUNK
    return numbers[skip : skip + count]
