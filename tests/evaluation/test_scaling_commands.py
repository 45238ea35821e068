"""The commands of `python -m evaluation.scaling` on CSVs of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scaling_points import study

from data_pipeline.errors import DataError, UserError
from evaluation.scaling.__main__ import main
from evaluation.scaling.points import require_one_kind, write_csv
from evaluation.scaling.sources import read_csv

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """An exact law with a constant, in somebody else's columns."""
    path = tmp_path / "points.csv"
    compute = np.geomspace(1e15, 1e19, 12)
    rows = [f"{x!r},{3 + 4 * (x / 1e15) ** -0.4!r},m{i}" for i, x in enumerate(compute.tolist())]
    path.write_text("\n".join(["flops,loss,model", *rows]))
    return path


@pytest.fixture
def studied(tmp_path: Path) -> Path:
    """A study's folder as `cluster.study` leaves it."""
    write_csv(tmp_path / "study" / "law" / "points.csv", study(num_seeds=3))
    return tmp_path / "study"


NAMES = ("--x", "flops", "--y", "loss", "--group", "model", "--rounds", "50")


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["scaling", *map(str, words)])
    assert main() == 0
    return capsys.readouterr().out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *words: call(capsys, monkeypatch, *words)


def test_fit(run: Any, table: Path) -> None:
    found = json.loads(run("fit", table, *NAMES, "--form", "power_constant", "--json"))
    assert found["status"] == "ok"
    assert found["parameters"]["constant"] == pytest.approx(3, abs=1e-6)
    assert found["intervals"]["exponent"] == pytest.approx([0.4, 0.4], rel=1e-6)
    assert found["constant_profile"] == pytest.approx([3, 3], abs=1e-6)
    assert found["flop_convention"] == "unstated"
    fixed = json.loads(run("fit", table, *NAMES, "--constant", "3", "--json"))
    assert fixed["parameters"]["exponent"] == pytest.approx(0.4, rel=1e-9)
    assert "exponent           0.4" in run("fit", table, *NAMES, "--constant", "profile")
    straight = json.loads(run("fit", table, *NAMES, "--json"))
    assert straight["status"] == "misfit"


def test_the_papers_form(run: Any, table: Path) -> None:
    """c + (k C)^-b with k = (4 * 1e15^0.4)^(-1/0.4)."""
    found = json.loads(run("fit", table, *NAMES, "--form", "paper", "--json"))
    assert found["parameters"]["log10_k"] == pytest.approx(-np.log10(4 * 1e15**0.4) / 0.4, rel=1e-9)
    assert "log10 k" in run("fit", table, *NAMES, "--form", "paper")


def test_predict(run: Any, table: Path) -> None:
    found = json.loads(run("predict", table, *NAMES, "--json"))
    assert [p["factor"] for p in found["predictions"]] == [10, 100]
    expected = [3 + 4 * (x / 1e15) ** -0.4 for x in (1e20, 1e21)]
    assert [p["value"] for p in found["predictions"]] == pytest.approx(expected, rel=1e-6)
    at = json.loads(run("predict", table, *NAMES, "--at", "1e20,1e16", "--rounds", "0", "--json"))
    assert [p["compute"] for p in at["predictions"]] == pytest.approx([1e20, 1e16])
    assert at["predictions"][0]["low"] is None
    with pytest.raises(UserError, match="--at 'much'"):
        run("predict", table, *NAMES, "--at", "much")


def test_compare(run: Any, studied: Path) -> None:
    words = ("compare", studied, "--frontier", "--rounds", "50")
    found = json.loads(run(*words, "--json"))
    assert [f["form"] for f in found["forms"]] == ["power", "power_constant", "broken"]
    assert len({round(test["cut_compute"]) for test in found["backtest"]}) == 5
    text = run(*words)
    assert "fitted below" in text
    assert "if nothing changed" in text


def test_frontier(run: Any, studied: Path) -> None:
    found = json.loads(run("frontier", studied, "--json"))
    assert found["points"]
    assert len(found["exclusions"]) + len(found["points"]) > len(found["candidates"]) - 1
    assert "mean of 3 seeds" in run("frontier", studied)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ("1e15,5\n2e15,4", "too_few_points"),
        ("\n".join(f"{x}e15,5" for x in range(1, 9)), "degenerate"),
        ("\n".join(f"{x}e15,{9 - x}" for x in range(1, 8)) + "\n9e15,nan", "invalid"),
        ("\n".join(f"{x}e15,{9 - x}" for x in range(8)), "invalid"),
        ("\n".join(f"{x}e15,{1 + x}" for x in range(1, 9)), "not_decreasing"),
    ],
    ids=["two points", "constant", "nan", "zero compute", "rising"],
)
def test_degenerate_points_get_a_status(run: Any, tmp_path: Path, rows: str, status: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"compute,value\n{rows}\n")
    for form in ("power", "power_constant"):
        found = json.loads(run("fit", path, "--form", form, "--json"))
        assert (found["status"], found["parameters"], found["intervals"]) == (status, {}, {})
        assert found["message"]
        assert status in run("fit", path, "--form", form)
    assert run("predict", path).strip().startswith(f"status: {status}")


def test_points_that_must_not_be_mixed(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    rows = [f"{x}e15,{9 - x},{'multiply-adds' if x > 3 else '2 per multiply-add'}" for x in range(1, 9)]
    path.write_text("\n".join(["compute,value,flop_convention", *rows]))
    with pytest.raises(UserError, match="different flop_convention"):
        run("fit", path)
    path.write_text(
        "\n".join(["compute,value,metric", *(f"{x}e15,{9 - x},{'fd' if x > 3 else 'nll'}" for x in range(9))])
    )
    with pytest.raises(UserError, match="choose one of --metric fd, --metric nll"):
        run("fit", path)
    assert json.loads(run("fit", path, "--metric", "fd", "--json"))["num_points"] == 5


@pytest.mark.parametrize("cell", ["6.8", "-7000", "inf", "nan", "0.5"])
@pytest.mark.parametrize("column", ["num_params", "images"])
def test_sizes_and_images_are_counts(tmp_path: Path, column: str, cell: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"compute,value,{column}\n1e15,5,7e9\n2e15,4,{cell}\n")
    with pytest.raises(DataError, match=f"line 3: {column} = '{cell}' is not a count .give counts, not billions"):
        read_csv(path)


def test_large_counts_are_rounded_and_none_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("compute,value,num_params,images\n1e15,5,6795600349.79,12\n2e15,4,,0\n")
    assert [(p.num_params, p.images) for p in read_csv(path)] == [(6795600350, 12), (0, 0)]


def test_messages_name_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("compute,value\n\n1e15,5\n\n\n2e15,thirty\n")
    with pytest.raises(DataError, match="line 6: value = 'thirty'"):
        read_csv(path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("the usual", "another way", "'the usual' and 'another way'"),
        ("[1]", "[2]", r"'\[1\]' and '\[2\]'"),
        ("", "by hand", "'' and 'by hand'"),
        ('{""n"": 1}', '{""n"": 2}', "n = 1 and 2"),
        ('{""n"": 1}', '{""n"":1}', "the same, written differently"),
    ],
)
def test_any_text_may_say_what_was_measured(tmp_path: Path, first: str, second: str, message: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f'compute,value,measured\n1e15,5,"{first}"\n2e15,4,"{second}"\n')
    with pytest.raises(DataError, match=f"different measured cannot share a fit: {message}"):
        require_one_kind(read_csv(path))


def test_one_size_is_a_learning_curve(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    rows = [f"{x!r},{5 * x**-0.1!r},123" for x in np.geomspace(1, 1e4, 9).tolist()]
    path.write_text("\n".join(["compute,value,num_params", *rows]))
    assert json.loads(run("fit", path, "--json"))["status"] == "one_size"


def test_mistakes_are_one_line_and_exit_code_2(table: Path, tmp_path: Path) -> None:
    for words, message in (
        (["fit", str(table), *NAMES, "--constant", "x"], "neither a number"),
        (["fit", str(table), "--x", "gflops", "--y", "loss"], "no column 'gflops'"),
        (["fit", str(tmp_path / "none.csv")], "there is no file"),
    ):
        command = [sys.executable, "-m", "evaluation.scaling", *words]
        failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
