"""The HTML report: one file that needs nothing else, with everything escaped; and the figures beside it."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_study import QUICK, law, write_runs
from scaling_points import point, study

from evaluation.report.html_page import MAX_ROWS, chart_figure, page, table
from evaluation.report.law_chart import law_chart
from evaluation.report.run_files import RunFiles, read_runs
from evaluation.report.study_report import runs_table, write_report
from evaluation.report.text_table import Table
from evaluation.scaling.law import fit_law

EVIL = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """What a browser would see: tags, resources, texts, the JSON of the charts."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.charts: list[dict[str, object]] = []
        self.text = ""
        self._inside, self._kind = "", None
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        self._inside, self._kind = tag, values.get("type")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            if self._kind in ("application/json", "text/plain"):
                plain = data if self._kind == "application/json" else gzip.decompress(base64.b64decode(data))
                self.charts.append(json.loads(plain))
        elif self._inside != "style":
            self.text += data + "\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("study")
    gap = [
        dataclasses.replace(p, metric="nll_gap", split="", value=0.01 * (-1) ** i)
        for i, p in enumerate(study(num_seeds=2))
    ]
    laws = [law(), fit_law([point(1e12, 300.0, metric="fd_efflite0")]), fit_law(gap, settings=QUICK)]
    written = write_report(folder / "law", laws, write_runs(folder), title="a study")
    return Page(written.html.read_text()), written.html, written.figures


def test_it_needs_no_other_file_and_no_network(report: tuple[Page, Path, dict[str, Path]]) -> None:
    page, path, _ = report
    assert page.resources
    assert all(r.startswith(("#", "data:image/")) for r in page.resources)
    assert not {"link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    style = re.findall(r"<style>(.*?)</style>", path.read_text(), re.DOTALL)
    assert not any("url(" in s or "@import" in s for s in style)
    assert path.read_text().count("* plotly.js v") == 1
    assert path.stat().st_size < 8e6


def test_the_verdict_comes_first_and_all_numbers_follow(report: tuple[Page, Path, dict[str, Path]]) -> None:
    text = report[0].text
    verdict = text.index(law().verdict)
    assert verdict < text.index("power law\n") < text.index("How it was measured", verdict)
    for law_fit in law().fits:
        if law_fit.fit.curve is not None and law_fit.hold_out.mean_relative_error is not None:
            assert f"{law_fit.hold_out.mean_relative_error:.1%}" in text
    assert "2 per multiply-add, training = 3 x forward" in text
    assert "fingerprint" in text  # the data's
    assert "size420000-seed1" in text
    assert "No law is fitted to the frontier: 1 point" in text
    assert "NLL, held-out less training images" in text
    for heading in ("What size for a budget", "Training", "Samples", "Backtest"):
        assert heading in text


def test_it_draws_every_figure(report: tuple[Page, Path, dict[str, Path]]) -> None:
    page, path, figures = report
    layouts = [chart["layout"] for chart in page.charts]
    titles = " ".join(layout["title"]["text"] for layout in layouts)  # type: ignore[index]
    for words in ("Learning curves", "Training loss by timestep", "Speed", "Equal compute", "L(N, D)", "held-out"):
        assert words in titles
    assert page.tags.count("img") == 4 * 3
    assert set(figures) >= {"nll_test", "nll_test_curves", "nll_gap_curves", "fd_efflite0_test", "isoflop", "size_data"}
    assert set(figures) >= {"loss_by_timestep", "speed", "samples"}
    for name, figure in figures.items():
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert name == "samples" or figure.with_suffix(".svg").exists()
    assert path.name == "report.html"


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    points = [point(1e12 * k, 5 - 0.1 * k, run=EVIL, data=EVIL, measured=EVIL) for k in range(1, 4)]
    run = RunFiles(EVIL, tmp_path / "run", 1_000_000)
    content = write_report(tmp_path, [fit_law(points)], [run], title=EVIL).html.read_text()
    assert "<img" not in content
    assert EVIL in Page(content).text


def test_nothing_evaluated_yet(tmp_path: Path) -> None:
    written = write_report(tmp_path, [fit_law([])], [RunFiles("run", tmp_path / "run", 10)], title="a study")
    assert "No law is fitted" in Page(written.html.read_text()).text
    empty = write_report(tmp_path, [], [], title="a study")
    assert "a study" in empty.html.read_text()
    assert empty.figures == {}
    assert "plotly.js" not in empty.html.read_text()


def test_runs_table_has_what_each_run_cost_and_reached(tmp_path: Path) -> None:
    runs = write_runs(tmp_path)
    rows = {row[0]: row for row in runs_table([law()], read_runs(runs)).rows}
    last = max((p for p in law().frontier.admitted if p.run == runs[0].name), key=lambda p: p.compute)
    assert rows[runs[0].name][1:7] == ["420 k", "0", "5,120", "2.44e+12", "2.101", "20.0%"]
    assert rows[runs[0].name][7] == f"{last.value:.4g} ± {last.stderr:.3f}"


def test_large_figures_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    chart = law_chart(law())
    plain = chart_figure(chart)
    monkeypatch.setattr("evaluation.report.html_page.MAX_PLAIN", 1000)
    packed = chart_figure(chart)
    assert Page(plain).charts == Page(packed).charts
    assert len(packed) < len(plain) / 2


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    one = fit_law([point(1e12 * k, 5 - 0.1 * k, num_params=0, images=0) for k in range(1, 7)], settings=QUICK)
    first, second = (write_report(tmp_path / name, [one], [], title="a").html.read_bytes() for name in "ab")
    assert first == second


def test_page_parts() -> None:
    many = table(Table(["n"], [[str(i)] for i in range(MAX_ROWS + 5)]))
    assert many.count("<tr>") == 1 + MAX_ROWS
    assert "5 more rows" in many
    assert table(Table(["a"], [])) == ""
    markup = table(Table(["name", "empty", "n"], [["x<y", "", "1"]], left=(0,)))
    assert "x&lt;y" in markup
    assert "empty" not in markup
    assert '<td class="n">1</td>' in markup
    assert page("t", "", [("one & two", "<p>x</p>"), ("b", "")]).count("one &amp; two") == 2
