"""What the rounds of a fit say together: intervals of its parameters, of its curve, of its predictions."""

from __future__ import annotations

import numpy as np
from scipy import special

from evaluation.scaling.intervals.rounds import Question, Rounds, targets
from evaluation.scaling.intervals.uncertainty import Prediction
from evaluation.scaling.points import Array, Interval

Ends = tuple[dict[str, Interval], Array, tuple[Prediction, ...]]


def ends(rounds: Rounds, centre: Rounds, question: Question, fitted: Array, confidence: float) -> Ends:
    """Intervals by parameter, band [2, m] and predictions: bias-corrected percentiles over the rounds.

    Args:
        centre: the one round that is fitted to what the others scatter about.
        fitted: what the fit itself predicts at the question's factors.
    """
    names = list(rounds.parameters)
    values, expected = _stacked(rounds), _stacked(centre)
    limits = _percentiles(values, expected[0] if len(expected) else np.median(values, axis=0), confidence)  # [2, q]
    num, m = len(names), len(question.band_compute)
    predictions = tuple(
        Prediction(float(compute), factor, float(value), *_pair(pair))
        for compute, factor, value, pair in zip(
            targets(question), question.factors, fitted, limits[:, num + m :].T, strict=True
        )
    )
    intervals = {name: _pair(pair) for name, pair in zip(names, limits.T[:num], strict=True)}
    return intervals, limits[:, num : num + m], predictions


def _percentiles(values: Array, expected: Array, confidence: float) -> Array:
    """Percentiles [2, q] of values [V, q], moved by how far those lie to one side of what is expected [q].

    Luck in who is ahead on a frontier moves every round to the same side, as it has moved the fit. They are moved once,
    not twice as in Efron's bias-corrected percentiles (1981): so simulated studies were held most evenly.
    """
    near = np.abs(values - expected) <= 1e-9 * np.abs(expected)  # at a bound, or without noise
    below = ((values < expected) & ~near).mean(axis=0) + near.mean(axis=0) / 2
    half = 0.5 / len(values)
    bias = special.ndtri(np.clip(below, half, 1 - half))
    z = special.ndtri((1 + confidence) / 2)
    levels = special.ndtr(np.stack([bias - z, bias + z]))  # [2, q]
    return np.stack([np.quantile(values[:, i], levels[:, i]) for i in range(values.shape[1])], axis=1)


def _stacked(rounds: Rounds) -> Array:
    """A column a quantity: parameters, band, predictions: [V, q]."""
    return np.hstack([np.stack(list(rounds.parameters.values()), axis=1), rounds.band, rounds.predictions])


def _pair(values: Array) -> Interval:
    return float(values[0]), float(values[1])
