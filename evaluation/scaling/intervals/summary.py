"""What the rounds of a fit say together: intervals of its parameters, of its curve, of its predictions."""

from __future__ import annotations

import numpy as np

from evaluation.scaling.intervals.rounds import Question, Rounds, targets
from evaluation.scaling.intervals.uncertainty import Prediction
from evaluation.scaling.points import Array, Interval

Ends = tuple[dict[str, Interval], Array, tuple[Prediction, ...]]


def ends(rounds: Rounds, question: Question, fitted: Array, confidence: float) -> Ends:
    """Intervals by parameter, band [2, m] and predictions: percentiles over the rounds.

    Args:
        fitted: what the fit itself predicts at the question's factors.
    """
    levels = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {name: _pair(np.quantile(values, levels)) for name, values in rounds.parameters.items()}
    limits = np.quantile(rounds.predictions, levels, axis=0).T
    predictions = tuple(
        Prediction(float(compute), factor, float(value), *_pair(pair))
        for compute, factor, value, pair in zip(targets(question), question.factors, fitted, limits, strict=True)
    )
    return intervals, np.quantile(rounds.band, levels, axis=0), predictions


def _pair(values: Array) -> Interval:
    return float(values[0]), float(values[1])
