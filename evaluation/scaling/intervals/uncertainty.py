"""How uncertain a fit is: intervals of its parameters, of its curve and of what it predicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from evaluation.scaling.intervals.spread import Spread
from evaluation.scaling.points import Interval

MIN_VALID_SHARE = 0.8  # of the rounds: with fewer that could be fitted, the intervals are unstable

Method = Literal["redraw", "resample", "none"]  # see bootstrap.py

UncertaintyStatus = Literal[
    "ok",
    "uncalibrated",  # intervals are given, but may cover the truth less (or more) often than they say
    "unstable",  # the form could not be fitted in many rounds
    "failed",  # no intervals
]


@dataclass(frozen=True)
class Prediction:
    """What a law says of a compute beyond those it was fitted to."""

    compute: float
    factor: float  # beyond the largest fitted compute
    value: float
    low: float | None  # of the interval; None where there is none
    high: float | None


@dataclass(frozen=True)
class Uncertainty:
    """Intervals of a fit's parameters and of its curve, over redrawn runs."""

    status: UncertaintyStatus
    message: str  # why the status is what it is; empty for "ok"
    method: Method
    num_runs: int  # curves: the seeds of a size are one
    num_frontier_runs: int  # those with a point on the frontier
    num_rounds: int
    num_valid: int  # rounds in which the form could be fitted
    confidence: float
    intervals: dict[str, Interval] = field(default_factory=dict)  # by parameter: exponent, constant, amplitude, ...
    band_compute: tuple[float, ...] = ()
    band_low: tuple[float, ...] = ()
    band_high: tuple[float, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    spread: Spread | None = None  # from which runs were redrawn
