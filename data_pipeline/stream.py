"""The training stream: image number n of the run's clock -> one image, whichever process asks.

Everything is a pure function of (seed, n), so any number of processes and threads sees the same global batches,
and resuming at any n costs nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, uniform
from data_pipeline.dataset import ShardDataset
from data_pipeline.order import DEFAULT_WINDOW, EpochOrder


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images of the clock."""

    images: NDArray[np.uint8]  # [n, C, H, W]
    labels: NDArray[np.int64]  # [n], -1 where unlabelled


class TrainStream:
    """Endless shuffled epochs of a data split, addressed by image number."""

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        seed: int,
        random_flip: bool,
        num_threads: int = 1,  # that decode one batch
        window: int = DEFAULT_WINDOW,  # of the shuffle, in samples
    ) -> None:
        sizes = np.array([shard.num_samples for shard in dataset.manifest.shards], dtype=np.int64)
        self.order = EpochOrder(sizes, seed=seed, window=window)
        self._dataset = dataset
        self._seed = seed
        self._random_flip = random_flip
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "decode") if num_threads > 1 else None

    def batch(self, start: int, count: int) -> ImageBatch:
        """The images start .. start + count - 1 of the run."""
        images, labels = self._read(self.order.samples(start, count))
        if self._random_flip:
            flipped = uniform(self._seed, Stream.FLIP, start, count) < 0.5
            images[flipped] = images[flipped, :, :, ::-1]
        return ImageBatch(images, labels)

    def _read(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        if self._pool is None:
            return self._dataset.read(samples)
        parts = list(self._pool.map(self._dataset.read, np.array_split(samples, self._num_threads)))
        return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])

    def close(self) -> None:
        """End the decoding threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
