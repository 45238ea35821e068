"""The inception score (Salimans et al. 2016, "Improved techniques for training GANs", arXiv:1606.03498, eq. in sec. 4).

    IS = exp(mean_x KL(p(y|x) || p(y))),  p(y) = mean_x p(y|x)

By convention it is computed for each of ten equal parts of the samples, in their order, and the mean and spread of the
ten are reported. It grows with the size of a part (50,000 samples: 5,000), so N belongs beside it. Samples in the order
of their classes give a score that is too low: every part then lacks most classes, and p(y) is of the part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.errors import DataError

Array = NDArray[np.float64]

NUM_SPLITS = 10


class InceptionScore:
    """Adds up class probabilities in the order of the samples; float64 sums, so its size is independent of N.

    Of a part with n samples, mean KL = (1/n) sum_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y).
    """

    def __init__(self, num: int, num_classes: int, *, num_splits: int = NUM_SPLITS) -> None:
        """`num`: samples in all; fewer than `num_splits` make as many parts as there are samples."""
        splits = min(num_splits, num)
        self._ends = [(split + 1) * num // splits for split in range(splits)]
        self._sums: Array = np.zeros((splits, num_classes))  # of p(y|x)
        self._negative_entropies: Array = np.zeros(splits)  # sums of p log p
        self._counts = np.zeros(splits, dtype=np.int64)
        self._num = 0

    def add(self, probs: ArrayLike) -> None:
        """Add the class probabilities [n, classes] of the next samples.

        Raises:
            DataError: another shape, or rows that are no probabilities.
        """
        p = np.asarray(probs, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] != self._sums.shape[1]:
            raise DataError(f"class probabilities [n, {self._sums.shape[1]}] are expected, not {list(p.shape)}.")
        if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(axis=1), 1, atol=1e-3)):
            raise DataError("class probabilities must be finite, not negative, and add up to one for every image.")
        assert self._num + len(p) <= self._ends[-1], "more samples than were announced"
        for split, end in enumerate(self._ends):
            begin = self._ends[split - 1] if split else 0
            part = p[max(begin - self._num, 0) : max(end - self._num, 0)]
            self._sums[split] += part.sum(axis=0)
            self._negative_entropies[split] += _sum_of_p_log_p(part)
            self._counts[split] += len(part)
        self._num += len(p)

    def scores(self) -> Array:
        """The score of each part: [splits]."""
        assert self._num == self._ends[-1], "fewer samples than were announced"
        marginals = self._sums / self._counts[:, None]
        entropies = -np.array([_sum_of_p_log_p(marginal) for marginal in marginals])
        scores: Array = np.exp(self._negative_entropies / self._counts + entropies)
        return scores


def inception_scores(probs: ArrayLike, *, num_splits: int = NUM_SPLITS) -> Array:
    """The score of each part of class probabilities [N, classes] in memory: [splits]."""
    p = np.asarray(probs, dtype=np.float64)
    score = InceptionScore(*p.shape, num_splits=num_splits)
    score.add(p)
    return score.scores()


def _sum_of_p_log_p(p: Array) -> float:
    """Over all entries, with 0 log 0 = 0."""
    return float(np.sum(p * np.log(np.where(p > 0, p, 1.0))))
