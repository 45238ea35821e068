"""Likelihoods compared on one plan: the difference has an error bar of its own, and a small one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from nll_process import gaussian_denoiser, make_process
from numpy.typing import NDArray
from random_stage import make_export, make_stage

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation import paired
from evaluation.chunks import Chunks, FinishedElsewhere, Shard
from evaluation.nll.estimate import estimate_nll
from evaluation.nll.settings import NllSettings
from evaluation.paired import compare, table
from evaluation.subject import Subject, open_subject
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion

STEPS = 24


@pytest.fixture(scope="module")
def dataset(generated_data: Path) -> ShardDataset:
    return ShardDataset(generated_data / "test")


@dataclass(frozen=True)
class _Named:
    path: Path


@dataclass(frozen=True)
class Analytic:
    """As a `Subject`: an exact denoiser of pixels with some standard deviation."""

    deviation: float
    num_timesteps: int = STEPS
    weights: str = "ema"
    device: str = "cpu"

    @property
    def export(self) -> _Named:
        return _Named(Path(f"deviation{self.deviation}"))

    @property
    def sha256(self) -> str:
        return str(self.deviation)

    def diffusion(self, respacing: str | None = None) -> GaussianDiffusion:
        return make_process(self.num_timesteps, respacing)

    def condition(self, labels: NDArray[np.int64]) -> Denoiser:
        return gaussian_denoiser(self.diffusion(), self.deviation)(labels)

    def check_data(self, dataset: ShardDataset) -> None:
        pass


def analytic(*deviations: float) -> list[Subject]:
    return [cast(Subject, Analytic(deviation)) for deviation in deviations]


def test_identical_networks_do_not_differ(dataset: ShardDataset) -> None:
    result = compare(analytic(0.5, 0.5), dataset, NllSettings(num_calls=256))
    first, second = result["exports"]
    assert first["nll"] == second["nll"]
    assert (second["difference"]["value"], second["difference"]["stderr"]) == (0, 0)
    assert second["shrunk"] is None
    assert "+0.00000 ± 0.00000 (no error is left)" in table(result)


def test_the_difference_is_that_of_exact_sweeps(dataset: ShardDataset) -> None:
    subjects, sweep = analytic(0.5, 0.4, 0.7), NllSettings(mode="exact")
    exact = [estimate_nll(s.condition, s.diffusion(), dataset, sweep).bits_per_dim for s in subjects]  # one noise
    result = compare(subjects, dataset, NllSettings(num_calls=1024))
    for row, value in zip(result["exports"][1:], exact[1:], strict=True):
        difference = row["difference"]
        assert abs(difference["value"] - (value - exact[0])) < 4 * difference["stderr"]
        assert row["shrunk"] > 2
        assert row["shrunk"] == pytest.approx(row["stderr_unpaired"] / difference["stderr"])


def test_the_target_is_that_of_the_differences(dataset: ShardDataset) -> None:
    once = compare(analytic(0.5, 0.4), dataset, NllSettings(num_calls=1024))
    target = once["exports"][1]["difference"]["stderr"] / 1.5
    found = compare(analytic(0.5, 0.4), dataset, NllSettings(num_calls=20_000, target_stderr=target))
    assert found["num_rounds"] > 1
    assert found["exports"][1]["difference"]["stderr"] <= target < found["exports"][1]["nll"]["stderr"]


def test_what_cannot_be_compared_is_refused(dataset: ShardDataset) -> None:
    other = cast(Subject, replace(Analytic(0.4), num_timesteps=12))
    with pytest.raises(UserError, match=r"deviation0\.5 24, deviation0\.4 12.*--nll-respacing"):
        compare([*analytic(0.5), other], dataset, NllSettings())
    compare([*analytic(0.5), other], dataset, NllSettings(num_calls=128, respacing="10"))
    with pytest.raises(UserError, match="two or more"):
        compare(analytic(0.5), dataset, NllSettings())
    with pytest.raises(UserError, match="--mode exact"):
        compare(analytic(0.5, 0.4), dataset, NllSettings(mode="exact"))


@pytest.fixture(scope="module")
def exports(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, stage = tmp_path_factory.mktemp("paired"), make_stage(tiny_config)
    first = make_export(folder / "first", stage)
    with torch.no_grad():
        for parameter in stage.network.parameters():
            parameter.mul_(0.9)
    return [first, make_export(folder / "second", stage)]


def test_processes_share_the_work(dataset: ShardDataset, tmp_path: Path) -> None:
    settings = NllSettings(num_calls=256)
    alone = compare(analytic(0.5, 0.4), dataset, settings)
    with pytest.raises(FinishedElsewhere):  # it has done its part; the first process writes the result
        compare(analytic(0.5, 0.4), dataset, settings, chunks=Chunks(tmp_path, shard=Shard(1, 2), patience=0.01))
    chunks = Chunks(tmp_path, shard=Shard(0, 2), patience=0.01)
    assert compare(analytic(0.5, 0.4), dataset, settings, chunks=chunks) == alone


def test_the_command_keeps_its_result(
    exports: list[Path], generated_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*map(str, exports), "--data", str(generated_data / "test"), "--num-calls", "128", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["paired", *arguments, "--json"])
    assert paired.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exports"][1]["difference"]["stderr"] > 0
    (kept,) = (exports[0] / "paired").iterdir()  # and no chunks
    assert json.loads(kept.read_text()) == result

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a kept result was computed again")

    monkeypatch.setattr(paired, "compare", again)
    monkeypatch.setattr(sys, "argv", ["paired", *arguments])
    assert paired.main() == 0
    assert "128 calls" not in (shown := capsys.readouterr().out)  # the pilot's are counted too
    assert "to the first" in shown
    for damaged in (kept.read_text()[:-20], "[]", json.dumps(result | {"key": "another"})):
        kept.write_text(damaged)
        with pytest.raises(UserError, match="is not the result"):
            paired.main()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--num-calls", "3"], "--num-calls 3 "),
        (["--seed", "-1"], "--seed -1 "),
        (["--seed", str(2**63)], f"--seed {2**63} "),
        (["--num-threads", "0"], "--num-threads 0 "),
        (["--num-threads", "-1"], "--num-threads -1 "),
    ],
)
def test_the_command_refuses_what_evaluate_refuses(
    generated_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], said: str
) -> None:
    command = ["paired", str(tmp_path), str(tmp_path), "--data", str(generated_data / "test"), *option]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=said):
        paired.main()


def test_the_commands_options_are_those_of_the_estimate(
    exports: list[Path], generated_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[NllSettings] = []

    def hear(subjects: Any, dataset: Any, settings: NllSettings, **_: Any) -> None:
        heard.append(settings)
        raise FinishedElsewhere

    monkeypatch.setattr(paired, "compare", hear)
    options = ["--mode", "uniform", "--no-clip", "--nll-respacing", "5", "--target-stderr", "0.5"]
    command = ["paired", *map(str, exports), "--data", str(generated_data / "test"), *options]
    monkeypatch.setattr(sys, "argv", command)
    assert paired.main() == 0
    assert heard == [NllSettings(mode="uniform", clip_denoised=False, respacing="5", target_stderr=0.5)]


def test_results_of_another_definition_are_not_these(
    exports: list[Path], dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = [open_subject(path) for path in exports]
    before = paired._key(subjects, dataset, NllSettings(), 0)
    monkeypatch.setattr(paired, "DEFINITION", paired.DEFINITION + 1)
    assert paired._key(subjects, dataset, NllSettings(), 0) != before
