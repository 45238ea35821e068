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
from size_data_points import TRUE, chinchilla, curves

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
    compared = json.loads(run("compare", path, "--json"))
    assert (compared["forms"][0]["status"], compared["backtest"]) == (status, [])
    assert status in run("compare", path)


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


@pytest.fixture
def one_size(tmp_path: Path) -> Path:
    """A learning curve: one size, its loss exactly a power law of the images."""
    path = tmp_path / "one.csv"
    images = [round(x) for x in np.geomspace(2000, 2e7, 12)]
    rows = [f"{6e6 * x!r},{5 * x**-0.1!r},123,{x}" for x in images]
    path.write_text("\n".join(["compute,value,num_params,images", *rows]))
    return path


@pytest.mark.parametrize("how", [(), ("--frontier",), ("--x", "images")])
def test_one_size_is_a_learning_curve(run: Any, one_size: Path, how: tuple[str, ...]) -> None:
    """Not a law in compute, by any command; a law in images where that is what is asked for."""
    words = (one_size, "--rounds", "0", "--json", *how)
    fitted, predicted = json.loads(run("fit", *words)), json.loads(run("predict", *words, "--form", "power"))
    compared = json.loads(run("compare", *words))
    statuses = {f["status"] for f in (fitted, predicted, compared["forms"][0])}
    if "images" in how:
        assert statuses == {"ok"}
        assert fitted["parameters"]["exponent"] == pytest.approx(0.1, rel=1e-9)
        assert compared["backtest"]
    else:
        assert statuses == {"one_size"}
        assert (fitted["parameters"], predicted["predictions"], compared["backtest"]) == ({}, [], [])
        assert {f["held_out"]["status"] for f in compared["forms"]} == {"one_size"}
        assert "one model size (123)" in run("compare", one_size, *how, "--rounds", "0")


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    """Curves of a known L(N, D), in the columns that the field calls N and D."""
    path = tmp_path / "sized.csv"
    points = curves(between=0.003, within=0.002, num_seeds=2)
    rows = [f"{p.compute!r},{p.value!r},{p.num_params},{p.images},{p.run}" for p in points]
    path.write_text("\n".join(["flops,loss,N,D,model", *rows]))
    return path


SIZED = ("--form", "size_data", "--params", "N", "--images", "D")


def test_size_and_data(run: Any, sized: Path) -> None:
    found = json.loads(run("fit", sized, *NAMES, *SIZED, "--json"))
    assert (found["status"], found["num_points"], found["num_runs"]) == ("ok", 96, 12)
    assert found["parameters"]["alpha"] == pytest.approx(TRUE.alpha, rel=0.1)
    assert found["intervals"]["alpha"][0] < TRUE.alpha < found["intervals"]["alpha"][1]
    assert found["fit"]["curve"]["E"] == found["parameters"]["E"]
    assert found["fit"]["bootstrap"]["num_rounds"] == 50
    assert "samples" not in found["fit"]["bootstrap"]
    text = run("fit", sized, *NAMES, *SIZED)
    assert "alpha" in text
    assert "95% of rounds" in text
    assert "weights: equal relative errors" in text


def test_size_and_data_take_a_known_spread(run: Any, sized: Path) -> None:
    alone, given = (
        json.loads(run("fit", sized, *NAMES, *SIZED, "--json", *words)) for words in ((), ("--run-spread", "0.05"))
    )
    width = [np.ptp(found["intervals"]["alpha"]) for found in (alone, given)]
    assert width[1] > 2 * width[0]


def test_size_and_data_of_chinchilla(run: Any, tmp_path: Path) -> None:
    """Besiroglu et al. 2024, table 1: E = 1.8172, alpha = 0.3478, beta = 0.3658, to a fiftieth of their errors."""
    write_csv(tmp_path / "chinchilla.csv", chinchilla())
    words = ("fit", tmp_path / "chinchilla.csv", "--form", "size_data", "--loss", "lad", "--rounds", "0", "--json")
    found = json.loads(run(*words))
    assert (found["status"], found["num_points"], found["weighted"]) == ("ok", 240, False)
    assert found["parameters"]["E"] == pytest.approx(1.8172, abs=6e-4)
    assert found["parameters"]["alpha"] == pytest.approx(0.3478, abs=4e-4)
    assert found["parameters"]["beta"] == pytest.approx(0.3658, abs=4e-4)
    assert found["intervals"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "--form", "size_data", "--constant", "3"), "--constant has no meaning for --form size_data"),
        (("fit", "--form", "size_data", "--frontier"), "--frontier has no meaning for --form size_data"),
        (("fit", "--form", "size_data", "--loss", "lad", "--delta", "1"), "--delta has no meaning for --loss lad"),
        (("fit", "--form", "power", "--loss", "lsq"), "--loss has no meaning for --form power"),
        (("fit", "--form", "broken", "--constant", "3"), "--constant 3 has no meaning for --form broken"),
        (("predict", "--form", "broken", "--constant", "fit"), "--constant fit has no meaning for --form broken"),
        (("compare", "--constant", "profile"), "--constant profile has no meaning for compare"),
    ],
)
def test_options_without_a_meaning_are_refused(run: Any, table: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(words[0], table, *NAMES, *words[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", "POINTS", "--at", "1e20", "--factor", "10"), "not allowed with argument"),
        *(
            ((*command, "--rounds", "49"), "percentiles of 49 rounds mean nothing: take 50 or more, or 0")
            for command in (
                ("fit", "POINTS"), ("predict", "POINTS"), ("compare", "POINTS"), ("isoflop", "POINTS"),
                ("size", "POINTS", "--compute", "1"), ("plot", "POINTS", "--out", "x.png"),
            )
        ),
        (("fit", "POINTS", "--rounds", "many"), "'many' is not a whole number"),
        (("frontier", "POINTS", "--min-images", "-1"), "'-1' is not a whole number"),
        (("fit", "POINTS", "--confidence", "95"), "'95' does not lie between 0 and 1"),
    ],
)  # fmt: skip
def test_options_out_of_range(
    run: Any, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_all_commands_select_the_same_frontier(run: Any, studied: Path) -> None:
    """The study's first points, after 600 images, are left out by default and taken where that is asked for."""
    nums = []
    for words in ((), ("--min-images", "0"), ("--min-images", "5000")):
        frontier = json.loads(run("frontier", studied, "--json", *words))
        fitted, predicted = (
            json.loads(run(command, studied, "--frontier", "--rounds", "0", "--json", *words))
            for command in ("fit", "predict")
        )
        assert fitted["num_points"] == predicted["num_points"] == len(frontier["points"])
        nums.append(len(frontier["points"]))
    assert len(set(nums)) == 3
    everything, late = (
        json.loads(run("fit", studied, "--rounds", "0", "--json", *words))["num_points"]
        for words in ((), ("--min-images", "1000"))
    )
    points = study(num_seeds=3)
    assert (everything, late) == (len(points), sum(p.images >= 1000 for p in points))
    assert late < everything


def test_points_may_all_be_too_early(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "\n".join(["compute,value,num_params,images", *(f"{x}e15,{9 - x},{x}000,{x}0" for x in range(1, 9))])
    )
    for command in ("fit", "predict", "compare"):
        assert "too_few_points: 0 points" in run(command, path, "--frontier")
    with pytest.raises(UserError, match="--min-images 1000 leaves out all points"):
        run("size", path, "--compute", "1e18", "--min-images", "1000")


@pytest.mark.parametrize(
    ("errors", "text", "weighted"),
    [
        (["0.1"] * 12, "weights: standard errors", True),
        ([""] * 12, "weights: equal relative errors", False),
        (["0.1"] * 9 + ["", "0", "nan"], "weights: none: 3 of 12 points have no positive standard error", False),
    ],
)
def test_a_fit_says_how_its_points_are_weighted(
    run: Any, table: Path, errors: list[str], text: str, weighted: bool
) -> None:
    header, *rows = table.read_text().split("\n")
    table.write_text("\n".join([f"{header},stderr", *(f"{row},{e}" for row, e in zip(rows, errors, strict=True))]))
    words = ("fit", table, *NAMES[:-1], "0")
    assert text in run(*words).split("\n")
    assert json.loads(run(*words, "--json"))["weighted"] is weighted


def test_a_known_constant_is_part_of_the_formula(run: Any, table: Path) -> None:
    words = (table, *NAMES[:-1], "0", "--constant", "2.75")
    assert "form         2.75 + a C^-b" in run("fit", *words)
    assert json.loads(run("predict", *words, "--json"))["formula"] == "2.75 + a C^-b"
    assert "2.75 + a C^-b" in run("compare", *words)


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
