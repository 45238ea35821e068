"""The scaling figure: what is drawn, ticks, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scaling_points import point, study

from evaluation.report.figures import compute_ticks, draw_law, save_figure, scientific, value_ticks
from evaluation.scaling.law import fit_law


@pytest.mark.parametrize(("low", "high"), [(4.2, 7.6), (4.4, 4.6), (3.0, 12.0), (60, 340), (1, 3000), (3.17, 3.73)])
def test_value_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = value_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert all(low <= t <= high for t in ticks)
    assert all(len(f"{t:g}") <= 5 for t in ticks)


def test_compute_ticks() -> None:
    assert compute_ticks(2.5e11, 4e13) == pytest.approx([3e11, 1e12, 3e12, 1e13, 3e13])
    assert compute_ticks(1e15, 1e21) == pytest.approx([10.0**d for d in range(15, 22)])
    assert scientific(1e12) == "$10^{12}$"
    assert scientific(3e12) == r"$3{\times}10^{12}$"


def test_figure_draws_every_curve_frontier_fit_and_held_out_points() -> None:
    law = fit_law(study(), num_rounds=50)
    axes = draw_law(law, title="a study").axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "training compute (FLOPs)"
    assert axes.get_ylabel() == "NLL (bits/dim), held-out images"
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert np.allclose(lines["frontier"].get_xdata(), [p.compute for p in law.frontier.points])
    assert any(label.startswith("frontier, upper third") for label in lines)
    assert any(label.startswith("power + constant: c = ") for label in lines)
    drawn = {tuple(np.asarray(line.get_xdata(), float)) for line in axes.get_lines()}
    for run in {p.run for p in law.frontier.candidates}:
        assert tuple(p.compute for p in law.frontier.candidates if p.run == run) in drawn
    colours = {to_hex(line.get_color()) for line in axes.get_lines()}
    assert len(colours) >= 4 + 2
    low, high = axes.get_ylim()
    assert all(low < p.value < high for p in law.frontier.candidates)


def test_figure_without_a_law_says_why() -> None:
    axes = draw_law(fit_law([point(1e12, 300.0, metric="fd_efflite0")])).axes[0]
    assert any("no law fitted: 1 point" in text.get_text() for text in axes.texts)
    assert "EfficientNet-Lite0" in axes.get_ylabel()
    assert any("no points" in text.get_text() for text in draw_law(fit_law([])).axes[0].texts)


def test_figure_files(tmp_path: Path) -> None:
    figure = draw_law(fit_law(study(), num_rounds=20))
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"law{suffix}"
        save_figure(figure, path)
        assert path.read_bytes().startswith(magic)
