"""What the printed addresses show in a browser: curves of every size on log axes, the laws on top, fits, report."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from made_study import NUM_POINTS, SEEDS, SIZES, MadeStudy, make_study
from ui_browser import CHROMEDRIVER, CHROMIUM, Page, browser

from cluster.report import write_report
from cluster.tracking import page_lines, send_report
from cluster.ui import serving
from evaluation.report.law_runs import CURVE_POINTS
from trainer.tracking.mlflow_pages import experiment_pages
from trainer.tracking.points import LawRun, load_law_runs

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver"),
]

TRIALS = {f"C={size} seed {seed}" for size in SIZES for seed in SEEDS}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> MadeStudy:
    """A study with its report, sent to a store of its own."""
    folder = tmp_path_factory.mktemp("ui")
    study = make_study(folder, uri=f"sqlite:///{folder}/mlflow.db")
    said = {"state": "running", "progress": "40%", "device": "n7: 8 GPUs", "retries": "3", "last_trouble": "n6 died"}
    (study.path / "status.json").write_text(json.dumps({"trials": dict.fromkeys(study.trials, said)}))
    lines = send_report(study, write_report(study))
    assert not any("not sent" in line for line in lines), lines
    return study


@pytest.fixture(scope="module")
def addresses(study: MadeStudy) -> Iterator[dict[str, str]]:
    """The printed addresses by name, while the server runs that shows them."""
    uri = str(study.study.tracking.uri)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(uri, port):
        (pages,) = experiment_pages(uri)
        lines = page_lines(pages, f"http://127.0.0.1:{port}")
        yield {" ".join(line.split()[:-1]): line.split()[-1] for line in lines}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def fits(study: MadeStudy) -> list[LawRun]:
    return [run for run in load_law_runs(study.law) if run.tags["kind"] == "law"]


def points_of(traces: dict[str, int], runs: set[str]) -> set[int]:
    assert runs <= traces.keys(), f"not drawn: {sorted(runs - traces.keys())}"
    return {traces[run] for run in runs}


def test_every_address_is_printed(addresses: dict[str, str]) -> None:
    assert set(addresses) == {"Scaling curves", "Training", "Throughput", "Trials", "Fits", "Report"}


@pytest.mark.parametrize("metric", ["nll/test", "nll/train", "fd_efflite0/test"])
def test_curves_of_every_size_on_log_axes_with_the_law_on_top(
    page: Page, addresses: dict[str, str], fits: list[LawRun], metric: str
) -> None:
    title, drawn = f"{metric} by GFLOP", {run.name for run in fits if metric in run.curves}
    assert drawn, "the made-up study follows a law, so one may be drawn"
    if title not in page.charts():
        page.open(addresses["Scaling curves"], height=4000)
    page.wait(lambda: title in page.charts() and TRIALS | drawn <= page.charts()[title]["traces"].keys(), title)
    chart = page.charts()[title]
    assert (chart["x"], chart["y"]) == ("log", "log")
    assert points_of(chart["traces"], TRIALS) == {NUM_POINTS}
    assert points_of(chart["traces"], drawn) == {CURVE_POINTS}
    others = {run.name for run in fits if metric not in run.curves}
    assert not any(chart["traces"].get(name) for name in others), "a law of another metric is drawn"


def test_the_scaling_view_has_its_sections(page: Page, addresses: dict[str, str]) -> None:
    if "nll/test by GFLOP" not in page.charts():
        page.open(addresses["Scaling curves"], height=4000)
    page.wait(lambda: "x: FLOP, linear" in page.text(), "the last section")
    for words in ("NLL (bits/dim), held-out images; x: GFLOP", "The same; x: images seen", "Study made"):
        assert words in page.text()


@pytest.mark.parametrize(
    ("view", "metrics"),
    [
        ("Training", ["train/loss", "train/mse_q0", "train/mse_q3", "train/vb_q3", "train/grad_norm", "train/lr"]),
        ("Throughput", ["speed/img_per_second", "speed/mfu", "system/cpu_utilization_percentage"]),
    ],
)
def test_every_trials_own_curves(page: Page, addresses: dict[str, str], view: str, metrics: list[str]) -> None:
    page.open(addresses[view], height=6000)
    for metric in metrics:
        page.wait(lambda m=metric: m in page.charts() and page.charts()[m]["traces"].keys() >= TRIALS, metric)
        chart = page.charts()[metric]
        assert chart["traces"].keys() == TRIALS
        assert min(chart["traces"].values()) > 50
    expected = "log" if view == "Training" else "linear"
    assert {page.charts()[metric]["x"] for metric in metrics if metric != "train/lr"} == {expected}


def test_the_table_of_fits_has_a_row_a_fit_and_its_numbers(
    page: Page, addresses: dict[str, str], fits: list[LawRun]
) -> None:
    page.open(addresses["Fits"], width=2400, height=1600)
    names = {run.name for run in fits}
    page.wait(lambda: all(name in page.text() for name in names), f"{sorted(names)}", seconds=30)
    text = page.text()
    assert f"{len(fits)} matching runs" in text
    assert not any(trial in text for trial in TRIALS)
    for column in ("exponent", "exponent_low", "exponent_high", "constant", "held_out_error", "r2_log", "status"):
        assert column in text.split()
    best = next(run for run in fits if run.tags["best"] == "yes")
    assert str(best.metrics["exponent"])[:6] in text


def test_the_table_of_trials_says_how_each_is_doing(page: Page, addresses: dict[str, str]) -> None:
    page.open(addresses["Trials"], width=2400, height=1600)
    page.wait(lambda: all(name in page.text() for name in TRIALS), "every trial", seconds=30)
    text = page.text()
    assert f"{len(TRIALS)} matching runs" in text
    for words in ("state", "progress", "device", "retries", "last_trouble", "running", "40%", "n7: 8 GPUs", "n6 died"):
        assert words in text


def test_the_report_opens_with_its_interactive_figures(page: Page, addresses: dict[str, str]) -> None:
    page.open(addresses["Report"], height=1400)
    with page.frame():
        drawn = "return [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.data.length).length"
        assert page.wait(lambda: page.driver.execute_script(drawn), "a figure of the report") >= 1
        assert "nll" in page.text().lower()
