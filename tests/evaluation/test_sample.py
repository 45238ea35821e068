"""`python -m evaluation.sample`: one stage, two stages at once and one after the other, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_stage import make_export, make_stage

from data_pipeline.errors import UserError
from evaluation.sample import main
from trainer.export import open_export
from trainer.sampling import sample

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.image_size=8", "model.attention_resolutions=[4]", "model.num_classes=4", "model.null_class=true")
LARGE = ("model.low_res_size=8", "model.num_classes=4", "name=upsampler")


@pytest.fixture(scope="module")
def exports(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A class-conditional 8 px network and its 16 px upsampler."""
    folder = tmp_path_factory.mktemp("exports")
    base, upsampler = make_stage(tiny_config, *SMALL), make_stage(tiny_config, *LARGE)
    return make_export(folder / "base", base), make_export(folder / "upsampler", upsampler)


def run(*arguments: object) -> None:
    """The command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        assert main() == 0


def made(out: Path, *arguments: object) -> tuple[np.ndarray, np.ndarray]:
    """arr_0 and arr_1 of a run of the command."""
    run(*arguments, "--respacing", 5, "--out", out)
    with np.load(out) as file:
        return file["arr_0"], file["arr_1"]


def test_two_stages_at_once_are_the_two_after_each_other(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, upsampler = exports
    images, classes = made(tmp_path / "both.npz", base, upsampler, "--num", 6, "--batch", 6)
    assert (images.shape, images.dtype, classes.tolist()) == ((6, 16, 16, 3), np.uint8, [0, 1, 2, 3, 0, 1])
    small, _ = made(tmp_path / "small.npz", base, "--num", 6, "--batch", 6)
    later, later_classes = made(tmp_path / "later.npz", upsampler, "--base", tmp_path / "small.npz", "--batch", 6)
    assert np.array_equal(later, images)
    assert np.array_equal(later_classes, classes)
    parts = [made(tmp_path / f"{i}.npz", base, upsampler, "--first", i, "--num", 3)[0] for i in (0, 3)]
    assert np.abs(np.concatenate(parts).astype(int) - images).max() <= 1  # batches of 3 round unlike one of 6
    grid = Image.open(tmp_path / "both.png")
    assert grid.width > 48
    account = json.loads((tmp_path / "both.json").read_text())
    assert (account["num"], account["respacing"], len(account["exports"])) == (6, ["5"], 2)
    assert account["exports"][0]["weights_sha256"] == open_export(base).weights_sha256["ema"]
    assert small.shape == (6, 8, 8, 3)


def test_classes_and_samplers_are_heard(exports: tuple[Path, Path], tmp_path: Path, tiny_config: Path) -> None:
    base, _ = exports
    images, classes = made(tmp_path / "a.npz", base, "--num", 3, "--classes", "2,-1", "--sampler", "ddim")
    assert classes.tolist() == [2, -1, 2]
    stage = make_stage(tiny_config, *SMALL, sampler="ddim")
    expected = sample(stage, range(3), labels=[2, -1, 2])
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), expected)


def test_what_does_not_fit_is_refused(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, upsampler = exports
    np.savez(tmp_path / "floats.npz", np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "big.npz", np.zeros((2, 16, 16, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no zip")
    for arguments, message in (
        ((upsampler, base), "stage 1 (upsampler) takes 8 px images to enlarge, but is given none"),
        ((base, "--classes", "9"), "class 9 is unknown"),
        ((base, "--classes", "cat"), "--classes cat"),
        ((base, "--respacing", "ddim33"), "ddim33"),
        ((base, "--respacing", "5", "--respacing", "6"), "2 times for 1"),
        ((base, "--eta", "0.5"), "eta=0.5"),
        ((base, "--num", "0"), "--num 0"),
        ((upsampler, "--base", tmp_path / "none.npz"), "no such file"),
        ((upsampler, "--base", tmp_path / "floats.npz"), "float64"),
        ((upsampler, "--base", tmp_path / "big.npz"), "given 16 px"),
        ((upsampler, "--base", tmp_path / "text.npz"), "not an npz"),
        ((tmp_path,), "not an export"),
    ):
        with pytest.raises(UserError) as caught:
            run(*arguments, "--out", tmp_path / "out.npz")
        assert message in str(caught.value)
        assert not (tmp_path / "out.npz").exists()


def test_the_command_ends_with_one_line_and_a_code() -> None:
    command = [sys.executable, "-m", "evaluation.sample", "nowhere", "--out", "out.npz"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is not an export")
