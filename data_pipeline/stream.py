"""The training stream: image number n of the run's clock -> one image, whichever process asks.

Everything is a pure function of (seed, n), so any number of processes and threads sees the same global batches,
and resuming at any n costs nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator, uniform
from data_pipeline.dataset import DamagedSampleError, Samples, ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.order import DEFAULT_WINDOW, EpochOrder

OnDamage = Literal["error", "replace"]
_MAX_SUBSTITUTES = 100  # tried for one damaged sample: beyond, it is not single samples that are damaged


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images of the clock."""

    images: NDArray[np.uint8]  # [n, C, H, W]
    labels: NDArray[np.int64]  # [n], -1 where unlabelled
    samples: NDArray[np.int64]  # [n], the sample numbers that were delivered
    flipped: NDArray[np.bool_]  # [n], mirrored left to right
    damaged: dict[int, str]  # the samples that have a substitute in here, and what is wrong with them


class TrainStream:
    """Endless shuffled epochs of a data split, addressed by image number.

    With `on_damage="replace"` a damaged sample gives way to another one, chosen by (seed, its number) alone: every
    process chooses the same, and the images around it stay where they are.

    Raises:
        DataError: the data set is remote and its cache too small for what the shuffle reads at a time.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        seed: int,
        random_flip: bool,
        num_threads: int = 1,  # that decode one batch
        window: int = DEFAULT_WINDOW,  # of the shuffle, in samples
        on_damage: OnDamage = "error",
    ) -> None:
        sizes = np.array([shard.num_samples for shard in dataset.manifest.shards], dtype=np.int64)
        dataset.check_cache(window)
        self.order = EpochOrder(sizes, seed=seed, window=window)
        self._dataset = dataset
        self._seed = seed
        self._random_flip = random_flip
        self._on_damage = on_damage
        self._prefetched = -1
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "decode") if num_threads > 1 else None

    def batch(self, start: int, count: int) -> ImageBatch:
        """The images start .. start + count - 1 of the run.

        Raises:
            DamagedSampleError: a sample is damaged and shall not be replaced.
            DataError: no substitute can be found, or a shard cannot be had.
        """
        samples = self.order.samples(start, count)
        self._prefetch(start, count)
        read = self._read(samples)
        damaged = {int(samples[row]): error.what for row, error in sorted(read.damaged.items())}
        for row, error in sorted(read.damaged.items()):
            samples[row] = self._replace(int(samples[row]), error, read, row)
        flipped = np.zeros(count, dtype=np.bool_)
        if self._random_flip:
            flipped = uniform(self._seed, Stream.FLIP, start, count) < 0.5
            _mirror(read.images, flipped)
        return ImageBatch(read.images, read.labels, samples, flipped, damaged)

    def _prefetch(self, start: int, count: int) -> None:
        """Let the shards of the coming images travel, where they must; told anew every stride of the order."""
        block = start // self.order.stride
        if self._dataset.is_remote and block != self._prefetched:
            self._prefetched = block
            self._dataset.prefetch(self.order.shards_ahead(block * self.order.stride, count + self.order.stride))

    def _read(self, samples: NDArray[np.int64]) -> Samples:
        if self._pool is None:
            return self._dataset.read_all(samples)
        parts = list(self._pool.map(self._dataset.read_all, np.array_split(samples, self._num_threads)))
        starts = np.cumsum([0, *(len(part.labels) for part in parts)]).tolist()
        return Samples(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
            {
                start + row: error
                for start, part in zip(starts[:-1], parts, strict=True)
                for row, error in part.damaged.items()
            },
        )

    def _replace(self, sample: int, error: DamagedSampleError, read: Samples, row: int) -> int:
        """Put an intact sample in the place of a damaged one; returns its number."""
        if self._on_damage == "error":
            raise error
        draws = generator(self._seed, Stream.SUBSTITUTE, sample).random(_MAX_SUBSTITUTES)
        for candidate in np.floor(draws * len(self._dataset)).astype(np.int64):
            found = self._dataset.read_all(candidate[None])
            if not found.damaged:
                read.images[row], read.labels[row] = found.images[0], found.labels[0]
                return int(candidate)
        raise DataError(f"{error} None of {_MAX_SUBSTITUTES} other samples can be read in its place.") from None

    def close(self) -> None:
        """End the decoding threads and what the data set runs in the background."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._dataset.close()


def _mirror(images: NDArray[np.uint8], which: NDArray[np.bool_]) -> None:
    """Mirror some of the images [n, C, H, W] left to right, in place."""
    if images.shape[3] % 8 == 0:
        words = images.view(np.uint64)  # [n, C, H, W / 8]: eight pixels at a time, then the bytes within
        words[which] = words[which, :, :, ::-1].byteswap()
    else:
        images[which] = images[which, :, :, ::-1]
