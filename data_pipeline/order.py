"""Which sample is image number n of a training run: a pure function of (seed, n).

Epoch e visits every sample once. Its order is a permutation of the shards, followed by a windowed shuffle: each
sample moves by less than `window` places. Reading therefore stays nearly sequential: at any time only the shards
under one window are being read. A split smaller than the window is shuffled completely.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator

DEFAULT_WINDOW = 1 << 18  # samples
_CACHED_EPOCHS = 2  # a batch may straddle two


class EpochOrder:
    """The order of samples for every epoch; `shard_sizes` are the numbers of samples in each shard."""

    def __init__(self, shard_sizes: NDArray[np.int64], *, seed: int, window: int = DEFAULT_WINDOW) -> None:
        assert window >= 1
        assert len(shard_sizes) > 0
        assert shard_sizes.min() >= 1
        self.num_samples = int(shard_sizes.sum())
        self._sizes = shard_sizes
        self._starts = np.cumsum(shard_sizes) - shard_sizes  # number of each shard's first sample
        self._seed = seed
        self._window = window
        self._cache: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()

    def samples(self, start: int, count: int) -> NDArray[np.int64]:
        """The sample numbers of images start .. start + count - 1 of the run: [count]."""
        assert start >= 0
        assert count >= 0
        parts = []
        while count > 0:
            epoch, position = divmod(start, self.num_samples)
            part = self.epoch(epoch)[position : position + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def shards_ahead(self, start: int, count: int) -> list[int]:
        """The shards that images start .. start + count - 1 may lie in, then those of one window more, in order."""
        reach = min(self._window, self.num_samples)
        first, last = max(start - reach, 0), start + count + 2 * reach  # in ranks, of this epoch and the next ones
        shards: dict[int, None] = {}
        for epoch in range(start // self.num_samples, last // self.num_samples + 1):
            order = self._shard_order(generator(self._seed, Stream.ORDER, epoch))
            ends = epoch * self.num_samples + np.cumsum(self._sizes[order])  # [num_shards]
            begin, end = np.searchsorted(ends, (first, last), side="right")
            shards.update(dict.fromkeys(order[begin : end + 1].tolist()))
        return list(shards)

    @property
    def stride(self) -> int:
        """Images after which `shards_ahead` is worth asking again: an eighth of a window."""
        return max(min(self._window, self.num_samples) // 8, 1)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """All sample numbers in the order of one epoch: [num_samples]."""
        with self._lock:
            if epoch not in self._cache:
                self._cache[epoch] = self._compute(epoch)
            self._cache.move_to_end(epoch)
            while len(self._cache) > _CACHED_EPOCHS:
                self._cache.popitem(last=False)
            return self._cache[epoch]

    def _compute(self, epoch: int) -> NDArray[np.int64]:
        rng = generator(self._seed, Stream.ORDER, epoch)
        shards = self._shard_order(rng)
        sizes = self._sizes[shards]
        ends = np.cumsum(sizes)
        # Rank r lies in permuted shard s at r - (start of s among the permuted): [num_samples]
        ranks = np.arange(self.num_samples, dtype=np.int64)
        in_order = ranks + np.repeat(self._starts[shards] - (ends - sizes), sizes)
        keys = rng.random(self.num_samples)
        if self._window < self.num_samples:
            keys = ranks + self._window * keys  # a sample can overtake only those less than `window` ahead
        order: NDArray[np.int64] = in_order[np.argsort(keys, kind="stable")]
        order.flags.writeable = False  # shared through the cache
        return order

    def _shard_order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """The permutation of the shards in an epoch: [num_shards]; its generator's first numbers."""
        # Sorting raw uniform numbers, not Generator.permutation: its algorithm may change between numpy versions.
        return np.argsort(rng.random(len(self._sizes)), kind="stable")
