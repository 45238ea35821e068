"""`python -m evaluation.sampler_curve`: as many steps as fit, each measurement made once, one figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from random_stage import make_export, make_stage

from data_pipeline.errors import ConfigError, UserError
from evaluation.request import EvalRequest
from evaluation.sampler_curve import BOUND, Way, main, read_calls, read_ways, requests
from trainer.config.diffusion import DiffusionConfig
from trainer.export import Export, open_export
from trainer.sampling import num_calls


@pytest.fixture(scope="module")
def export(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return open_export(make_export(tmp_path_factory.mktemp("curve") / "export", make_stage(tiny_config)))


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sampler_curve", *map(str, arguments)])
        assert main() == 0


@pytest.mark.parametrize("word", ["ancestral", "ddim", "ddim:quadratic"])
def test_a_sampler_gets_the_most_steps_that_fit(word: str) -> None:
    diffusion = DiffusionConfig(num_timesteps=100)
    (way,) = read_ways(word, 100)
    for calls in (2, 7, 10, 99):
        sampling = way.within(calls, diffusion)
        assert sampling is not None
        assert num_calls(diffusion, sampling) <= calls
        more = way.sampling(int(sampling.respacing.removeprefix(way.spacing)) + 1)
        assert num_calls(diffusion, more) > calls


def test_where_no_spacing_fits_the_point_is_left_out() -> None:
    # 51 to 99 steps at a fixed stride there are not: fewer are taken.
    sampling = Way("ddim", "ddim").within(60, DiffusionConfig(num_timesteps=100))
    assert sampling is not None
    assert sampling.respacing == "ddim50"


def test_the_bound_belongs_to_no_sampler(export: Export, generated_data: Path) -> None:
    base = EvalRequest(data=generated_data / "test", metrics=("nll", "fd"))
    found = list(requests(base, read_ways("ddim,ancestral", 100), [5, 200], export))
    assert [(label, num) for label, num, _ in found] == [
        (BOUND, 5),
        ("ddim", 5),
        ("ancestral", 5),
        ("ddim", 100),
        ("ancestral", 100),
    ]  # fmt: skip - at most the hundred steps that there are
    assert [request.metrics for _, _, request in found] == [("nll",), *[("fd",)] * 4]
    assert found[0][2].nll.respacing == "5"


def test_the_figure_grows_and_nothing_is_measured_twice(
    export: Export, generated_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [export.path, "--data", generated_data / "test", "--metrics", "nll,fd", "--num-samples", 8,
              "--nll-calls", 128, "--num-threads", 1, "--out", tmp_path / "curve"]  # fmt: skip
    run(*common, "--samplers", "ddim", "--calls", "3")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "curve" / "records").glob("*.json")}
    assert len(files) == 2
    run(*common, "--samplers", "ddim,ancestral", "--calls", "3,5")
    assert all(path.stat().st_mtime_ns == at for path, at in files.items())
    points = json.loads((tmp_path / "curve" / "curve.json").read_text())["points"]
    assert sorted((p["way"], p["metric"], p["num_calls"]) for p in points) == sorted(
        [(BOUND, "nll", 3), (BOUND, "nll", 5)]
        + [(way, "fd_efflite0", calls) for way in ("ddim", "ancestral") for calls in (3, 5)]
    )
    assert all(p["record"]["value"] == p["value"] for p in points)
    with Image.open(tmp_path / "curve" / "curve.png") as picture:
        assert min(picture.size) > 400
    assert "fd_efflite0" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "5,x", "0,5", "5,,10"])
def test_calls_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--calls"):
        read_calls(text)


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(ConfigError, match="magic"):
        read_ways("ddim,magic", 100)
    with pytest.raises(ConfigError, match="respacing"):
        read_ways("ddim:magic", 100)
    with pytest.raises(UserError, match="none"):
        read_ways(" , ", 100)


@pytest.mark.parametrize("metric", ["memorisation", "accuracy"])
def test_metrics_that_no_sampler_changes_are_refused(export: Export, generated_data: Path, metric: str) -> None:
    with pytest.raises(UserError, match=f"--metrics {metric}"):
        run(export.path, "--data", generated_data / "test", "--metrics", metric, "--out", export.path / "curve")
