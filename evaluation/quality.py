"""The metrics of sample quality by name, and their values for two sets of features.

A metric is asked for by its kind. Its record's name says the feature net, and only Inception's have the names that
papers use: `fd` is `fid` there and `fd_efflite0` in another net's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import DataError, UserError
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.kernel import SUBSET_SIZE, kernel_distance
from evaluation.metrics.precision_recall import NEIGHBOURS, precision_recall
from evaluation.statistics import FeatureStats, require_comparable

if TYPE_CHECKING:
    from evaluation.features.feature_set import FeatureSet
    from evaluation.moments import Gaussian

KINDS = ("fd", "sfd", "is", "kd", "precision", "recall")
INCEPTION = "inception"
_INCEPTION_NAMES = {"fd": "fid", "sfd": "sfid", "kd": "kid"}
_ALIASES = {name: kind for kind, name in _INCEPTION_NAMES.items()}
_ONLY_INCEPTION = {"sfd": "spatial features", "is": "class probabilities"}
# Images of either set that a metric needs at least.
FEWEST = {"fd": 2, "sfd": 2, "is": 2, "kd": 4, "precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1}
NEED_ROWS = ("kd", "precision", "recall")  # the features of single images


@dataclass(frozen=True)
class Measured:
    """A metric's value."""

    value: float
    stderr: float | None = None  # None where no estimate of it is at hand: repeat over seeds
    details: dict[str, Any] = field(default_factory=dict)  # how it was computed; "notes": what to know of it


def record_name(kind: str, net: str) -> str:
    """What a metric is called in records: `fid`, `precision` with Inception, else `fd_<net>`, `precision_<net>`."""
    return _INCEPTION_NAMES.get(kind, kind) if net == INCEPTION else f"{kind}_{net}"


def check_kinds(kinds: Sequence[str], net: str, *, others: Sequence[str] = ()) -> tuple[str, ...]:
    """The kinds that were asked for, in this net's features; fid, sfid and kid mean fd, sfd and kd of Inception.

    `others`: metrics that the caller knows besides, for the message.

    Raises:
        UserError: an unknown name, or a metric that this net does not give; says what would be right.
    """
    found = []
    for name in kinds:
        kind = _ALIASES.get(name, name)
        if kind not in KINDS:
            raise UserError(f"unknown metric {name!r}; known: {', '.join((*others, *KINDS, *_ALIASES))}.")
        if net != INCEPTION:
            remedy = "use --feature-net inception --feature-weights FILE"
            if kind in _ONLY_INCEPTION:
                raise UserError(f"{name!r} is of {_ONLY_INCEPTION[kind]}, which {net} does not give: {remedy}.")
            if name in _ALIASES:
                raise UserError(f"{name!r} is of Inception-v3's features, not {net}'s: {remedy}, or ask for {kind}.")
        found.append(kind)
    if not found:
        raise UserError(f"no metric is asked for; known: {', '.join((*KINDS, *_ALIASES))}.")
    return tuple(dict.fromkeys(found))


def need_rows(kinds: Sequence[str]) -> bool:
    """Whether one of these needs the features of single images."""
    return any(kind in NEED_ROWS for kind in kinds)


def check_gives(stats: FeatureStats, kinds: Sequence[str], *, has_rows: bool, whose: str, is_reference: bool) -> None:
    """Refuse metrics that a set of features cannot give, before anything is computed.

    Args:
        has_rows: whether the features of single images are there.
        whose: the set, for the message.

    Raises:
        DataError: names the metric and what is missing.
    """
    for kind in kinds:
        if kind in NEED_ROWS and not has_rows:
            missing = "the features of single images"
        elif kind == "sfd" and stats.spatial is None:
            missing = "spatial features (mu_s, sigma_s)"
        elif kind == "is" and stats.inception_scores is None and not is_reference:
            missing = "class probabilities"
        else:
            continue
        name = record_name(kind, stats.identity.net)
        raise DataError(
            f"{name!r} needs {missing}, which {whose} does not hold: give the images, or leave {name!r} out."
        )


def quality(
    samples: FeatureSet, reference: FeatureSet, kinds: Sequence[str], *, device: str = "cpu"
) -> dict[str, Measured]:  # fmt: skip
    """The metrics of samples against real images, by kind.

    Args:
        kinds: as `check_kinds` gives them.
        device: where the pairwise distances of precision and recall are computed.

    Raises:
        DataError: features of different nets, weights or resizes; a metric that one of the sets cannot give; too few
            images for it.
    """
    require_comparable(samples.identity, reference.identity)
    for features, whose, is_reference in ((samples, "the set of samples", False), (reference, "the reference", True)):
        has_rows = features.rows is not None
        check_gives(features.stats, kinds, has_rows=has_rows, whose=whose, is_reference=is_reference)
    found: dict[str, Measured] = {}
    for kind in kinds:
        if kind == "fd":
            found[kind] = _frechet(samples, reference, samples.stats.pool, reference.stats.pool)
        elif kind == "sfd":
            assert samples.stats.spatial is not None
            assert reference.stats.spatial is not None
            found[kind] = _frechet(samples, reference, samples.stats.spatial, reference.stats.spatial)
        elif kind == "is":
            found[kind] = _inception_score(samples)
        elif kind == "kd":
            found[kind] = _kernel(samples, reference)
        elif kind not in found:  # precision and recall come together
            both = _precision_recall(samples, reference, device)
            found |= {name: value for name, value in both.items() if name in kinds}
    return {kind: found[kind] for kind in kinds}


def _frechet(samples: FeatureSet, reference: FeatureSet, x: Gaussian, y: Gaussian) -> Measured:
    notes = _notes(samples, reference)
    few = [
        f"{features.num} {what}"
        for features, gaussian, what in ((samples, x, "samples"), (reference, y, "reference images"))
        if gaussian.vectors is not None
    ]
    if few:
        notes.append(
            f"{' and '.join(few)} are no more than the {x.dim} dimensions: the distance is exact for these images, but "
            "far above that of many; compare it at equal N only."
        )
    return _measured(frechet_distance(x, y), None, {}, notes)


def _inception_score(samples: FeatureSet) -> Measured:
    scores = samples.stats.inception_scores
    assert scores is not None
    stderr = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return Measured(float(scores.mean()), stderr, {"splits": len(scores), "std": float(scores.std())})


def _kernel(samples: FeatureSet, reference: FeatureSet) -> Measured:
    x, y = samples.rows, reference.rows
    assert x is not None
    assert y is not None
    num, notes = min(len(x), len(y)), _notes(samples, reference)
    size = min(SUBSET_SIZE, num)
    if size < SUBSET_SIZE:
        notes.append(f"subsets of {size} images instead of {SUBSET_SIZE}: there are no more.")
    found = kernel_distance(x, y, subset_size=size)
    details = {"subsets": found.num_subsets, "subset_size": found.subset_size, "std": found.std}
    return _measured(found.value, found.stderr, details | _row_counts(x, y), notes)


def _precision_recall(samples: FeatureSet, reference: FeatureSet, device: str) -> dict[str, Measured]:
    x, y = samples.rows, reference.rows
    assert x is not None
    assert y is not None
    precision, recall = precision_recall(x, y, device=device)
    details, notes = {"k": NEIGHBOURS} | _row_counts(x, y), _notes(samples, reference)
    return {name: _measured(value, None, details, notes) for name, value in
            (("precision", precision), ("recall", recall))}  # fmt: skip


def _row_counts(x: Any, y: Any) -> dict[str, Any]:
    """Of single images; published statistics may be of more than the images that come with them."""
    return {"num_samples": len(x), "num_reference": len(y)}


def _notes(samples: FeatureSet, reference: FeatureSet) -> list[str]:
    foreign = [
        whose
        for features, whose in ((samples, "of the samples"), (reference, "of the reference"))
        if features.identity.is_foreign
    ]
    if not foreign:
        return []
    return [f"the statistics {' and '.join(foreign)} do not say which weights made them: the net is taken on trust."]


def _measured(value: float, stderr: float | None, details: dict[str, Any], notes: list[str]) -> Measured:
    return Measured(value, stderr, details | ({"notes": notes} if notes else {}))
