"""The metrics by name: which are refused, what they are called, what they say beside the value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_net import ToyNet, bare_net, in_parts, some_images

from data_pipeline.errors import DataError, UserError
from evaluation.features.feature_set import FeatureSet, feature_arrays, gather
from evaluation.metrics.frechet import frechet_features
from evaluation.metrics.kernel import kernel_distance
from evaluation.metrics.precision_recall import precision_recall
from evaluation.quality import KINDS, check_kinds, quality, record_name
from evaluation.statistics import UNKNOWN, FeatureIdentity, FeatureStats


def features_of(num: int, seed: int, net: ToyNet | None = None, low: int = 0) -> FeatureSet:
    net = net or ToyNet()
    images = torch.from_numpy(some_images(num, seed, low=low)).permute(0, 3, 1, 2)
    return gather(net, in_parts(feature_arrays(net(images)), []), data=f"seed {seed}", num=num)


def test_names_in_records() -> None:
    assert [record_name(kind, "inception") for kind in KINDS] == ["fid", "sfid", "is", "kid", "precision", "recall"]
    assert record_name("fd", "efflite0") == "fd_efflite0"
    assert record_name("precision", "efflite0") == "precision_efflite0"


def test_names_in_requests() -> None:
    assert check_kinds(["fid", "kd", "kid", "sfid", "recall"], "inception") == ("fd", "kd", "sfd", "recall")
    assert check_kinds(["fd", "kd"], "efflite0") == ("fd", "kd")
    for name in ("fid", "kid"):
        with pytest.raises(UserError, match=f"'{name}' is of Inception-v3's .* --feature-net inception"):
            check_kinds([name], "efflite0")
    for name, what in (("is", "class probabilities"), ("sfd", "spatial features"), ("sfid", "spatial features")):
        with pytest.raises(UserError, match=f"'{name}' is of {what}, which efflite0 does not give: use --feature-net"):
            check_kinds(["fd", name], "efflite0")
    with pytest.raises(UserError, match="unknown metric 'fdi'; known: fd, sfd"):
        check_kinds(["fdi"], "inception")
    with pytest.raises(UserError, match="no metric is asked for"):
        check_kinds([], "inception")


def test_values_are_those_of_the_metrics() -> None:
    x, y = features_of(60, 0, low=30), features_of(40, 1)
    found = quality(x, y, KINDS)
    assert tuple(found) == KINDS
    assert x.rows is not None
    assert y.rows is not None
    assert found["fd"].value == pytest.approx(frechet_features(x.rows, y.rows), rel=1e-9)
    kernel = kernel_distance(x.rows, y.rows, subset_size=40)
    assert (found["kd"].value, found["kd"].stderr) == (kernel.value, kernel.stderr)
    assert (found["precision"].value, found["recall"].value) == precision_recall(x.rows, y.rows)
    scores = x.stats.inception_scores
    assert scores is not None
    assert found["is"].value == scores.mean()
    assert found["is"].details == {"splits": 10, "std": scores.std()}
    assert found["is"].stderr == pytest.approx(scores.std() / 3, rel=1e-12)  # sqrt(10 - 1)
    assert tuple(quality(x, y, ["recall", "fd"])) == ("recall", "fd")


def test_few_images_are_noted() -> None:
    found = quality(features_of(3, 0), features_of(50, 1), ["fd", "sfd", "kd"])
    assert "3 samples are no more than the 3 dimensions" in found["fd"].details["notes"][0]
    assert "3 samples are no more than the 4 dimensions" in found["sfd"].details["notes"][0]
    assert "subsets of 3 images instead of 1000" in found["kd"].details["notes"][0]
    assert found["kd"].details["subset_size"] == 3
    assert "notes" not in quality(features_of(5, 0), features_of(50, 1), ["fd"])["fd"].details


def test_features_of_different_nets_are_refused() -> None:
    x = features_of(10, 0)
    for other in (ToyNet(weights_sha256="1" * 64), ToyNet(resize=9), ToyNet(name="efflite0")):
        with pytest.raises(DataError, match="cannot be compared"):
            quality(x, features_of(10, 1, other), ["fd"])


def test_statistics_of_unknown_weights_are_compared_with_a_note() -> None:
    x = features_of(10, 0)
    foreign = FeatureSet(FeatureStats(FeatureIdentity("inception", UNKNOWN, 0), "", 0, x.stats.pool), None)
    found = quality(x, foreign, ["fd", "is"])
    assert found["fd"].value == pytest.approx(0, abs=1e-9)
    assert "of the reference do not say which weights" in found["fd"].details["notes"][0]
    assert "notes" not in found["is"].details


@pytest.mark.parametrize(
    ("kind", "name", "missing"),
    [("sfd", "sfid", "mu_s"), ("kd", "kid", "single images"), ("precision", "precision", "single images")],
)
def test_what_statistics_alone_cannot_give(kind: str, name: str, missing: str) -> None:
    x = features_of(10, 0)
    bare = FeatureSet(FeatureStats(x.identity, "", 10, x.stats.pool), None)
    with pytest.raises(DataError, match=f"'{name}' needs .*{missing}.*, which the reference does not hold: .*{name}"):
        quality(x, bare, [kind])
    with pytest.raises(DataError, match=f"'{name}' needs .*{missing}.*, which the set of samples does not hold"):
        quality(bare, x, [kind])
    with pytest.raises(DataError, match="'is' needs class probabilities, which the set of samples"):
        quality(bare, x, ["is"])
    assert quality(x, bare, ["is"])["is"].value >= 1


def test_other_dimensions_and_too_few_images() -> None:
    x = features_of(10, 0, bare_net())
    other = FeatureSet(FeatureStats(x.identity, "", 9, x.stats.spatial or features_of(9, 1).stats.spatial), None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="do not fit together"):
        quality(x, other, ["fd"])
    with pytest.raises(DataError, match="k = 3 need at least 4 images, not 3"):
        quality(features_of(3, 0), features_of(9, 1), ["precision"])


def test_nan_in_a_hand_made_set_is_no_silent_value() -> None:
    x = features_of(10, 0)
    rows = np.array(x.rows)
    rows[2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        quality(FeatureSet(x.stats, rows), x, ["kd"])
    with pytest.raises(DataError, match="not finite"):
        quality(x, FeatureSet(x.stats, rows), ["precision"])
