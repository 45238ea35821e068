"""The published trend lines: they agree with the paper's own tables in its count of compute, and in no other."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.scaling.paper import PAPER_FID, PAPER_NLL, in_flops, published, trend


def test_the_lines_are_the_published_ones() -> None:
    compute = np.array([1e18, 1e20])
    assert PAPER_NLL(compute) == pytest.approx(3.40 + (3.0e-15 * compute) ** -0.17)
    assert PAPER_FID(compute) == pytest.approx(4.00 + (2.5e-25 * compute) ** -0.22)
    assert in_flops(trend(1.0, 1e-10, 0.3))(2e12) == pytest.approx(trend(1.0, 1e-10, 0.3)(1e12))


@pytest.mark.parametrize(("metric", "tolerance"), [("nll", 0.006), ("fid", 0.07)])
def test_published_points_lie_on_the_line_only_if_compute_counts_multiply_adds(metric: str, tolerance: float) -> None:
    (law,) = published(metric)
    x, y = (np.array([getattr(p, name) for p in law.points]) for name in ("compute", "value"))
    right = np.abs(law.curve(x) / y - 1)
    wrong = np.abs({"nll": PAPER_NLL, "fid": PAPER_FID}[metric](x) / y - 1)  # as if the paper counted as we do
    assert right.max() < tolerance
    assert wrong.mean() > 2 * right.mean()
    assert law.range_compute == (x.min(), x.max())
    assert "multiply-adds" in law.label
    assert "ImageNet-64" in law.label


@pytest.mark.parametrize("metric", ["fd_efflite0", "fd_inception", "sfid", "kid", "nll_gap", "value"])
def test_no_line_for_other_metrics(metric: str) -> None:
    assert published(metric) == ()
