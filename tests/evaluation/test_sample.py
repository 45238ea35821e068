"""`python -m evaluation.sample`: one stage, two stages at once and one after the other, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from random_stage import make_export, make_stage

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation.chunks import Chunks
from evaluation.sample import main
from evaluation.sample_files import read_samples, write_npz
from evaluation.sample_place import Place
from evaluation.sample_request import Request
from evaluation.sampling_job import sample_chunks
from trainer.cascade import sample_cascade
from trainer.config.run import load_config
from trainer.diffusion.samplers import to_uint8
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


def test_keys_of_images_are_what_they_were(tiny_config: Path) -> None:
    """Images made before networks and processes had more settings are still found. Keys of the code of before."""
    small, large = (SimpleNamespace(config=load_config(tiny_config, settings)) for settings in (SMALL, LARGE))
    for exports, key in (([small, large], "d69685857041ba0a"), ([small], "ad97697f99992e34")):
        request = Request(exports, [], "ema", range(4), None, 4, None, None, 0, 16)  # type: ignore[arg-type]
        assert request.key({"seed": 0}) == key


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
    assert (account["num"], account["respacing"], len(account["exports"])) == (6, ["5", "5"], 2)
    assert account["exports"][0]["weights_sha256"] == open_export(base).weights_sha256["ema"]
    assert small.shape == (6, 8, 8, 3)


def test_classes_and_samplers_are_heard(exports: tuple[Path, Path], tmp_path: Path, tiny_config: Path) -> None:
    base, _ = exports
    images, classes = made(tmp_path / "a.npz", base, "--num", 3, "--classes", "2,-1", "--sampler", "ddim")
    assert classes.tolist() == [2, -1, 2]
    stage = make_stage(tiny_config, *SMALL, sampler="ddim")
    expected = sample(stage, range(3), labels=[2, -1, 2])
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), expected)


def test_parts_have_the_classes_of_the_whole(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = exports
    chosen = ("--classes", "3,0,1", "--batch", 2)
    images, classes = made(tmp_path / "whole.npz", base, "--num", 6, *chosen)
    later, later_classes = made(tmp_path / "later.npz", base, "--first", 4, "--num", 2, *chosen)
    assert later_classes.tolist() == classes[4:].tolist() == [0, 1]
    assert np.array_equal(later, images[4:])


def test_parts_of_a_base_keep_its_rows_and_classes(exports: tuple[Path, Path], tmp_path: Path) -> None:
    """Row i of the base belongs to image i; its classes are not i modulo their number."""
    _, upsampler = exports
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "base.npz", small, np.array([3, 0, 2, 2, 1, 3]))
    given = (upsampler, "--base", tmp_path / "base.npz", "--batch", 2)
    images, classes = made(tmp_path / "whole.npz", *given)
    assert classes.tolist() == [3, 0, 2, 2, 1, 3]
    later, later_classes = made(tmp_path / "later.npz", *given, "--first", 4)
    assert later_classes.tolist() == [1, 3]
    assert np.array_equal(later, images[4:])
    middle, middle_classes = made(tmp_path / "middle.npz", *given, "--first", 2, "--num", 2)
    assert middle_classes.tolist() == [2, 2]
    assert np.array_equal(middle, images[2:4])
    for more in (("--first", 6), ("--first", 4, "--num", 3), ("--num", 7)):
        with pytest.raises(UserError, match="has images 0 to 5; image 6 was asked for"):
            run(*given, *more, "--out", tmp_path / "out.npz")


def test_one_chunk_at_most_is_held(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(tiny_config)
    batches: list[weakref.ref[torch.Tensor]] = []

    def watched(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        assert all(batch() is None for batch in batches)
        images = sample_cascade(*args, **kwargs)
        batches.append(weakref.ref(images[-1]))
        return images

    monkeypatch.setattr("evaluation.sampling_job.sample_cascade", watched)
    parts = sample_chunks([stage], range(3, 8), batch=1, device="cpu", chunks=Chunks())
    images = [part["images"] for part in parts]
    assert len(batches) == 5
    for number, image in zip(range(3, 8), images, strict=True):
        assert torch.equal(torch.from_numpy(image).permute(0, 3, 1, 2), sample(stage, [number]))


def test_an_npz_is_written_as_numpy_would_without_holding_it(tmp_path: Path) -> None:
    def parts(num: int) -> Iterator[np.ndarray]:
        for start in range(0, num, 16):
            yield np.full((16, 32, 32, 3), start % 251, np.uint8)

    peaks = []
    for num in (64, 2048):
        tracemalloc.start()
        write_npz(tmp_path / f"{num}.npz", parts(num), num=num, image_size=32, labels=[1] * num, scratch=tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 64 * 2048  # the classes, no image: one has 3072 bytes
    np.savez(tmp_path / "numpy.npz", np.concatenate(list(parts(2048))), np.array([1] * 2048))
    assert (tmp_path / "numpy.npz").read_bytes() == (tmp_path / "2048.npz").read_bytes()
    images, labels = read_samples(tmp_path / "2048.npz")
    assert torch.equal(images, torch.from_numpy(np.concatenate(list(parts(2048)))).permute(0, 3, 1, 2))
    assert labels == [1] * 2048
    np.savez_compressed(tmp_path / "small.npz", np.ones((2, 4, 4, 3), np.uint8))
    assert read_samples(tmp_path / "small.npz")[0].tolist() == torch.ones(2, 3, 4, 4).tolist()


# ---- shared and interrupted jobs ----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the images of every batch that is made."""
    made: list[list[int]] = []

    def counted(stages: Any, numbers: Any, **options: Any) -> list[torch.Tensor]:
        made.append(list(numbers))
        return sample_cascade(stages, numbers, **options)

    monkeypatch.setattr("evaluation.sampling_job.sample_cascade", counted)
    return made


def same_files(one: Path, other: Path) -> bool:
    """Whether two results are the same bytes, but for the account's paths."""
    if one.is_dir():
        names = sorted(path.name for path in one.iterdir())
        return names == sorted(path.name for path in other.iterdir()) and all(
            (one / name).read_bytes() == (other / name).read_bytes() for name in names
        )
    return all(
        one.with_suffix(suffix).read_bytes() == other.with_suffix(suffix).read_bytes()
        for suffix in (".npz", ".png", ".json")
    )


@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_parts_make_the_whole_bit_for_bit(
    exports: tuple[Path, Path], tmp_path: Path, calls: list[list[int]], name: str
) -> None:
    given = (*exports, "--num", 7, "--batch", 2, "--respacing", 3)
    whole, shared = tmp_path / "one" / name, tmp_path / "two" / name
    run(*given, "--out", whole)
    calls.clear()
    run(*given, "--out", shared, "--shard", "1/2")
    assert calls == [[2, 3], [6]]
    assert not shared.exists()
    run(*given, "--out", shared, "--shard", "0/2")
    assert sorted(calls) == [[0, 1], [2, 3], [4, 5], [6]]
    assert same_files(whole, shared)
    run(*given, "--out", shared, "--shard", "1/2")  # comes when all is over
    assert len(calls) == 4
    assert [path.name for path in shared.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_an_interrupted_job_goes_on(
    exports: tuple[Path, Path], tmp_path: Path, calls: list[list[int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the third batch, then in every later step: nothing is made twice."""
    given = (exports[0], "--num", 8, "--batch", 2, "--respacing", 3)
    whole, out = tmp_path / "one" / name, tmp_path / "two" / name
    run(*given, "--out", whole)
    calls.clear()

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def stop_at_third(*_: Any, **__: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt

    for target, how in (
        ("trainer.cascade.to_uint8", lambda images, own=to_uint8: stop_at_third() or own(images)),
        ("evaluation.sample.save_grid", stopped),
        ("evaluation.sample.write_json", stopped),
        ("evaluation.sample_place.Place.remove_chunks", stopped),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, how)
            with pytest.raises(KeyboardInterrupt):
                run(*given, "--out", out)
        if target == "trainer.cascade.to_uint8":
            assert len(list((out.parent / f".{name}.chunks").glob("*/samples/*.npz"))) == 2
    run(*given, "--out", out)
    assert calls == [[0, 1], [2, 3], [4, 5], [4, 5], [6, 7]]
    assert same_files(whole, out)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_chunks_of_another_request_are_not_taken(
    exports: tuple[Path, Path], tmp_path: Path, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = exports
    given = (base, "--num", 4, "--batch", 2, "--respacing", 3)
    changes: tuple[tuple[object, ...], ...] = (
        ("--seed", 1), ("--guidance", 2), ("--classes", 1), ("--sampler", "ddim"), ("--respacing", 4),
        ("--first", 1), ("--batch", 4),
    )  # fmt: skip
    out = tmp_path / "a.npz"
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.sample.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(*given, "--out", out)  # all its chunks lie there
        for change in changes:
            arguments = [*given, *change]
            if "--respacing" in change:
                arguments = [*given[:-2], *change]
            calls.clear()
            with pytest.raises(UserError, match="--overwrite"):
                run(*arguments, "--out", out)
            with suppress(KeyboardInterrupt):
                run(*arguments, "--out", out, "--overwrite")
            assert sum(map(len, calls)) == 4, change


@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_an_account_stays_until_its_images_are_replaced(
    exports: tuple[Path, Path], tmp_path: Path, calls: list[list[int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it does not pass for the new one's, with which nothing more would be made."""
    given = (exports[0], "--num", 4, "--batch", 2, "--respacing", 3, "--out", tmp_path / name)
    run(*given)
    account = Place(tmp_path / name).account
    before = account.read_bytes()
    again = (*given, "--seed", 1, "--overwrite")
    calls.clear()
    run(*again, "--shard", "1/2")
    assert calls == [[2, 3]]
    assert account.read_bytes() == before

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    for target in ("trainer.cascade.to_uint8", "evaluation.sample.write_json"):
        assert account.read_bytes() == before
        with monkeypatch.context() as patch:
            patch.setattr(target, stopped)
            with pytest.raises(KeyboardInterrupt):
                run(*again, "--shard", "0/2")
    assert account.exists() == (name == "a")  # the npz is new, the folder is not
    calls.clear()
    run(*again, "--shard", "0/2")
    assert calls == []
    assert json.loads(account.read_text())["seed"] == 1


KILLS = 6


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_two_processes_killed_at_any_moment(exports: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """As torchrun starts them; both are killed after a while, again and again, until they came through."""
    given = [str(exports[0]), "--num", "64", "--batch", "2", "--respacing", "40", "--num-threads", "1"]
    whole, out = tmp_path / "one" / name, tmp_path / "two" / name
    run(*given, "--out", whole)
    rng = np.random.default_rng(0)
    for attempt in range(KILLS + 1):
        jobs = [
            subprocess.Popen(
                [sys.executable, "-m", "evaluation.sample", *given, "--out", str(out)], cwd=ROOT,
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            )
            for rank in range(2)
        ]  # fmt: skip
        if attempt < KILLS:
            time.sleep(rng.uniform(2.0, 8.0))
            for job in jobs:
                job.send_signal(signal.SIGKILL)
        codes = [job.wait(timeout=120) for job in jobs]
    assert codes == [0, 0]
    assert same_files(whole, out)


# ---- shards -------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_data_split(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = exports
    given = ("--num", 5, "--first", 2, "--classes", "3,-1")
    images, classes = made(tmp_path / "a.npz", base, *given)
    run(base, *given, "--respacing", 5, "--out", tmp_path / "a")
    dataset = ShardDataset(tmp_path / "a")
    found, labels = dataset.read(np.arange(5))
    assert np.array_equal(found.transpose(0, 2, 3, 1), images)
    assert labels.tolist() == classes.tolist() == [3, -1, 3, -1, 3]
    manifest = dataset.manifest
    assert (manifest.split, manifest.num_classes, manifest.source.kind) == ("samples", 4, "samples")
    assert manifest.source.options["stage1.weights_sha256"] == open_export(base).weights_sha256["ema"]
    assert (manifest.source.options["stage1.respacing"], manifest.source.options["seed"]) == ("5", 0)
    account = json.loads((tmp_path / "a" / "account.json").read_text())
    assert account["fingerprint"] == manifest.fingerprint
    assert Image.open(tmp_path / "a" / "grid.png").width > 8
    tar = str(tmp_path / "a" / manifest.shards[0].file)
    plain = list(webdataset.WebDataset(tar, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png"))
    assert [key for key, _ in plain] == [f"{number:09d}" for number in range(2, 7)]
    assert np.array_equal(np.stack([image for _, image in plain]), images)


def test_a_folder_of_other_things_is_never_replaced(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = exports
    given = (base, "--num", 2, "--respacing", 3, "--out", tmp_path / "a")
    run(*given)
    with pytest.raises(UserError, match="--overwrite"):
        run(*given, "--seed", 1)
    run(*given, "--seed", 1, "--overwrite")
    assert json.loads((tmp_path / "a" / "account.json").read_text())["seed"] == 1
    dear = tmp_path / "dear"
    dear.mkdir()
    (dear / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other things than samples"):
        run(*given[:-1], dear, "--overwrite")
    assert (dear / "thesis.txt").read_text() == "dear"


def test_damaged_samples_are_not_blamed_on_a_source_of_images(exports: tuple[Path, Path], tmp_path: Path) -> None:
    run(exports[0], "--num", 2, "--respacing", 3, "--out", tmp_path / "a")
    (tmp_path / "a" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"Remove .*/a and make it anew with python -m evaluation.sample"):
        ShardDataset(tmp_path / "a")


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_results_are_replaced_only_when_asked(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = exports
    out = tmp_path / "new" / "a.npz"
    first, _ = made(out, base, "--num", 1)
    for kept in (".npz", ".png", ".json"):
        for suffix in {".npz", ".png", ".json"} - {kept}:
            out.with_suffix(suffix).unlink(missing_ok=True)
        out.with_suffix(kept).write_text("dear")
        with pytest.raises(UserError, match=rf"a\{kept} exists.*--overwrite"):
            made(out, base, "--num", 1)
        assert out.with_suffix(kept).read_text() == "dear"
    again, _ = made(out, base, "--num", 1, "--overwrite")
    assert np.array_equal(first, again)
    assert Image.open(out.with_suffix(".png")).height > 8
    assert json.loads(out.with_suffix(".json").read_text())["num"] == 1


@pytest.fixture
def nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("evaluation.sample.sample_chunks", sampled)


def refused(out: Path | str, *arguments: object) -> str:
    """What the command says before anything is sampled."""
    with pytest.raises(UserError) as caught:
        run(*arguments, "--out", out)
    return str(caught.value)


@pytest.mark.usefixtures("nothing_is_sampled")
def test_what_does_not_fit_is_refused(exports: tuple[Path, Path], tmp_path: Path, tiny_config: Path) -> None:
    base, upsampler = exports
    classless = make_export(tmp_path / "classless", make_stage(tiny_config))
    for arguments, message in (
        ((upsampler, base), "stage 1 (upsampler) takes 8 px images to enlarge, but is given none"),
        ((base, "--classes", "9"), "class 9 is unknown"),
        ((base, "--classes", "0,0,9", "--batch", "2"), "class 9 is unknown"),
        ((base, upsampler, "--classes=-1"), "class -1 is unknown to upsampler: it knows 0 to 3"),
        ((base, "--classes", "cat"), "--classes cat"),
        ((classless, "--classes", "1"), "--classes 1: these networks know no classes"),
        ((base, "--respacing", "ddim33"), "ddim33"),
        ((base, upsampler, "--respacing", "5", "--respacing", "101"), "101 steps were asked of 100"),
        ((base, "--respacing", "5", "--respacing", "6"), "2 times for 1"),
        ((base, "--eta", "0.5"), "eta=0.5"),
        ((base, upsampler, "--guidance", "2"), "guidance=2: upsampler has no null class"),
        ((classless, "--guidance", "0"), "guidance=0: tiny has no null class"),
        ((base, "--guidance", "2", "--guidance", "1"), "--guidance was given 2 times for 1"),
        ((base, "--guidance", "2", "--classes", "1,-1"), "guidance=2: class -1 (none) is nothing to be guided to"),
        ((base, "--guidance", "0", "--classes", "1"), "--classes 1: --guidance 0 samples without classes"),
        ((base, "--guidance=-1"), "guidance=-1"),
        ((base, "--shard", "2/2"), "--shard 2/2"),
        ((base, "--num", "0"), "--num 0"),
        ((base, "--num-threads", "0"), "--num-threads 0 is too small"),
        ((base, "--num-threads", "-1"), "--num-threads -1 is too small"),
        ((base, "--seed", 2**63), f"--seed {2**63} is too large"),
        ((base, "--first", 2**63), f"--first {2**63} is too large"),
        ((base, "--num", 10**12), f"--num {10**12} is too large; use 100000000 or less"),
        ((base, "--first", 10**8 - 1, "--num", 2), "images have the numbers 0 to 99999999"),
        ((tmp_path,), "not an export"),
    ):
        assert message in refused(tmp_path / "out.npz", *arguments)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.usefixtures("nothing_is_sampled")
def test_a_base_that_is_none_is_refused(exports: tuple[Path, Path], tmp_path: Path) -> None:
    _, upsampler = exports
    images, base = np.zeros((2, 8, 8, 3), np.uint8), tmp_path / "base.npz"
    for arrays, message in (
        ([np.zeros((2, 8, 8, 3))], "arr_0 is float64"),
        ([np.zeros((2, 16, 16, 3), np.uint8)], "given 16 px"),
        ([images[:0]], "holds no images"),
        ([images[:, :0, :0]], "holds no images"),
        ([images, np.array([1, 2, 3])], "2 images in arr_0 but classes [3]"),
        ([images, np.array([0.0, 1.0])], "arr_1 (float64) must hold classes"),
        ([images, np.array(["cat", "dog"])], "arr_1 (<U3) must hold classes"),
        ([images, np.array([0, -2], np.int8)], "arr_1 (int8) must hold classes"),
        ([images, np.array([0, 4])], "class 4 is unknown to upsampler"),
        ([images, np.array([{}, {}])], "not an npz of samples"),
    ):
        np.savez(base, *arrays)
        assert message in refused(tmp_path / "out.npz", upsampler, "--base", base)
    np.savez(base, images)
    whole = base.read_bytes()
    for content in (b"", b"no zip", whole[:-40]):
        base.write_bytes(content)
        assert "not an npz" in refused(tmp_path / "out.npz", upsampler, "--base", base)
    with open(base, "wb") as file:
        np.save(file, images)
    assert "not an npz" in refused(tmp_path / "out.npz", upsampler, "--base", base)
    assert "no such file" in refused(tmp_path / "out.npz", upsampler, "--base", tmp_path / "none.npz")


@pytest.mark.usefixtures("nothing_is_sampled")
def test_a_place_that_cannot_be_written_is_refused(exports: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = exports
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "grid.png").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in (
        ("samples.png", "must end in .npz"),
        ("folder.npz", "folder.npz is a folder"),
        ("grid.npz", "grid.png is a folder"),
        ("file/a.npz", "file is a file, not a folder"),
        ("file", "file is a file; add .npz"),
        ("file/b/a.npz", "file is a file, not a folder"),
    ):
        assert message in refused(tmp_path / out, base, "--overwrite")
    for nameless in (".", "", "/", ".."):
        assert "has no name of its own" in refused(nameless, base, "--overwrite")


def test_the_command_ends_with_one_line_and_a_code() -> None:
    command = [sys.executable, "-m", "evaluation.sample", "nowhere", "--out", "out.npz"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is not an export")


# ---- noise between stages --------------------------------------------------------------------------------------------

NOISY = "model.low_res_noise.max_step=60"


@pytest.fixture(scope="module")
def noisy_exports(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Networks of 4 px, from 4 to 8 and from 8 to 16 px, the last two trained with noise on what they enlarge."""
    folder = tmp_path_factory.mktemp("noisy")
    stages = {
        "base": ("model.image_size=4", "model.attention_resolutions=[]", "model.channel_mult=[1]"),
        "middle": ("model.image_size=8", "model.low_res_size=4", "model.attention_resolutions=[]", NOISY),
        "large": ("model.low_res_size=8", NOISY),
    }
    return [
        make_export(folder / name, make_stage(tiny_config, *settings, f"name={name}"))
        for name, settings in stages.items()
    ]


def test_three_stages_with_noise_are_the_same_on_any_number_of_processes(
    noisy_exports: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*noisy_exports, "--num", 6, "--batch", 2, "--respacing", 8, "--augmentation", "truncated",
             "--augmentation", "non_truncated", "--low-res-noise", 40, "--low-res-noise", 20)  # fmt: skip
    run(*given, "--out", tmp_path / "one.npz")
    for part in ("1/2", "0/2"):
        run(*given, "--out", tmp_path / "two.npz", "--shard", part)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"])
    account = json.loads((tmp_path / "one.json").read_text())
    assert account["low_res_noise"] == [0, 40, 20]
    assert account["augmentation"] == ["non_truncated", "truncated", "non_truncated"]
    assert account["reached_step"] == [None, 42, None]  # of 0, 14, 28, 42, ... 99, the first that is not below 40
    assert (
        "stage 2 was given images as noisy as step 42, the first from 40 on that is visited" in capsys.readouterr().out
    )
    options = account["options"]
    assert (options["stage2.low_res_noise"], options["stage2.augmentation"]) == (40, "truncated")
    assert options["stage3.low_res_noise"] == 20
    assert "stage1.low_res_noise" not in options
    run(*given[:-1], 30, "--out", tmp_path / "other.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "other.npz") as other:
        assert (one["arr_0"] != other["arr_0"]).any()
    assert json.loads((tmp_path / "other.json").read_text())["key"] != account["key"]


def test_noise_without_truncation_goes_through_files_as_well(noisy_exports: list[Path], tmp_path: Path) -> None:
    base, middle, _ = noisy_exports
    common = ("--num", 4, "--batch", 4, "--respacing", 5)
    run(base, middle, *common, "--low-res-noise", 30, "--out", tmp_path / "both.npz")
    run(base, *common, "--out", tmp_path / "small.npz")
    run(middle, "--base", tmp_path / "small.npz", *common, "--low-res-noise", 30, "--out", tmp_path / "later.npz")
    assert "reached_step" not in json.loads((tmp_path / "both.json").read_text())  # it is 30, as asked
    with np.load(tmp_path / "both.npz") as both, np.load(tmp_path / "later.npz") as later:
        assert np.array_equal(both["arr_0"], later["arr_0"])


@pytest.mark.parametrize(
    ("which", "options", "said"),
    [
        ([0], ["--low-res-noise", 3], "here none are"),
        ([0, 1, 2], ["--low-res-noise", 61], "stage 2: low_res_noise=61"),
        ([0, 1, 2], ["--low-res-noise", 3, "--low-res-noise", 3, "--low-res-noise", 3], "3 times for 2 stages"),
        ([0, 1], ["--low-res-noise", -1], "low_res_noise=-1"),
        ([1], ["--base", "small.npz", "--low-res-noise", 3, "--augmentation", "truncated"], "are finished"),
        ([0, 1, 2], ["--augmentation", "truncated"], "--augmentation truncated .* give it a --low-res-noise above 0"),
        ([0, 1], ["--augmentation", "truncated", "--low-res-noise", 0], "--augmentation truncated .* which is 0"),
        (
            [0, 1, 2],
            [
                "--low-res-noise",
                0,
                "--low-res-noise",
                3,
                "--augmentation",
                "truncated",
                "--augmentation",
                "non_truncated",
            ],
            "--augmentation truncated .* which is 0",
        ),
    ],
)
def test_noise_that_cannot_be_is_refused(
    noisy_exports: list[Path], tmp_path: Path, which: list[int], options: list[Any], said: str
) -> None:
    run(noisy_exports[0], "--num", 2, "--respacing", 2, "--out", tmp_path / "small.npz")
    options = [tmp_path / option if option == "small.npz" else option for option in options]
    with pytest.raises(UserError, match=said):
        run(*(noisy_exports[number] for number in which), *options, "--out", tmp_path / "no.npz")
