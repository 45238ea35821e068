"""`python -m evaluation.scaling plot`: pictures and pages of any CSV."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from scaling_points import study

from data_pipeline.errors import UserError
from evaluation.scaling.commands import plot
from evaluation.scaling.points import write_csv


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A CSV of nothing but compute and a value."""
    compute = np.geomspace(1e18, 1e21, 12)
    rows = [f"{x},{4 + 2e5 * x**-0.22}" for x in compute]
    path = tmp_path / "bare.csv"
    path.write_text("\n".join(["flops,FID", *rows]) + "\n")
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    plot.add(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["plot", *map(str, arguments), "--rounds", "50"])
    code: int = parsed.run(parsed)
    return code


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".html", b"<!DOC")]
)
def test_the_suffix_is_the_format(
    bare: Path, tmp_path: Path, suffix: str, magic: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"law{suffix}"
    assert run(bare, "--x", "flops", "--y", "FID", "--out", out) == 0
    assert out.read_bytes().startswith(magic)
    assert f"wrote {out}: " in capsys.readouterr().out


def test_forms_and_the_published_line_can_be_chosen(bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "law.svg"
    run(bare, "--x", "flops", "--y", "FID", "--out", out, "--form", "power_constant", "--title", "mine & yours")
    text = out.read_text()
    assert "power + constant: exponent 0.22" in text
    assert "power law" not in text
    assert "mine &amp; yours" in text
    run(bare, "--x", "flops", "--y", "FID", "--out", out, "--paper")
    assert "Nichol &amp; Dhariwal 2021, ImageNet-64 (their C counts multiply-adds, here ×2)" in out.read_text()


def test_a_study_with_sizes_and_seeds(tmp_path: Path) -> None:
    write_csv(tmp_path / "points.csv", study(num_seeds=2))
    out = tmp_path / "law.svg"
    run(tmp_path / "points.csv", "--out", out)
    text = out.read_text()
    assert all(size in text for size in ("420 k", "940 k", "1.68 M", "3.7 M"))
    assert "Nichol" not in text  # too far from the paper's compute


def test_what_cannot_be_drawn_is_refused(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"law\.gif.*\.png, \.svg, \.pdf, \.html"):
        run(bare, "--x", "flops", "--y", "FID", "--out", tmp_path / "law.gif")
    write_csv(tmp_path / "fd.csv", study())
    lines = (tmp_path / "fd.csv").read_text().replace("nll,", "fd_efflite0,")
    (tmp_path / "fd.csv").write_text(lines)
    with pytest.raises(UserError, match="fd_efflite0"):
        run(tmp_path / "fd.csv", "--out", tmp_path / "law.png", "--paper")
    (tmp_path / "macs.csv").write_text(
        lines.replace("fd_efflite0,", "nll,").replace("2 per multiply-add", "1 per multiply-add")
    )
    with pytest.raises(UserError, match="1 per multiply-add"):
        run(tmp_path / "macs.csv", "--out", tmp_path / "law.png", "--paper")
    assert not (tmp_path / "law.png").exists()
