"""`python -m evaluation.frechet A B`: what it prints, keeps and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_net import ToyNet, some_images

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation import frechet
from evaluation.features.reference import reference_features
from evaluation.moments import moments_of
from evaluation.quality import quality

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> ToyNet:
    """In place of every network; its three dimensions pass for Inception's."""
    net = ToyNet()

    def get(name: str, *, device: str, weights: Path | None) -> ToyNet:
        net.name = name
        net.spatial_dim, net.num_classes = (4, 3) if name == "inception" else (0, 0)
        return net

    monkeypatch.setattr(frechet, "get_feature_net", get)
    monkeypatch.setattr(frechet, "_INCEPTION_DIM", 3)
    return net


@pytest.fixture
def a(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", some_images(60, low=30))
    return tmp_path / "a.npz"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    np.savez(tmp_path / "b.npz", some_images(80, 1))
    return tmp_path / "b.npz"


@pytest.fixture
def adm(tmp_path: Path) -> Path:
    """As ADM's reference batches are: statistics of many images, and fewer images."""
    rng = np.random.default_rng(0)
    pool, spatial = moments_of(rng.uniform(0, 250, (500, 3))), moments_of(rng.uniform(0, 250, (500, 4)))
    path = tmp_path / "VIRTUAL.npz"
    np.savez(
        path,
        arr_0=some_images(30, 2),
        mu=pool.mean,
        sigma=pool.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )
    return path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["frechet", *map(str, arguments)])
    assert frechet.main() == 0
    return capsys.readouterr().out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_images_against_shards(net: ToyNet, command: Any, a: Path, generated_data: Path) -> None:
    split = ShardDataset(generated_data / "test")
    found = json.loads(command(a, generated_data / "test", "--metrics", "fd,kd,recall", "--json"))
    assert set(found["metrics"]) == {"fd_efflite0", "kd_efflite0", "recall_efflite0"}
    expected = quality(frechet.image_features(frechet.open_images(a), net), reference_features(split, net), ["fd"])
    assert found["metrics"]["fd_efflite0"]["value"] == expected["fd"].value
    assert found["B"] == {
        "path": str(generated_data / "test"), "num": len(split), "of": len(split),
        "data": split.manifest.fingerprint, "net": "efflite0", "weights_sha256": "0" * 64, "resize": 8,
    }  # fmt: skip


def test_text_says_values_and_what_they_are_of(net: ToyNet, command: Any, a: Path, b: Path) -> None:
    lines = command(a, b, "--metrics", "fid,is,kid", "--feature-net", "inception", "--num", "50").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["fid", "is", "kid"]
    assert ["±" in line for line in lines[:3]] == [False, True, True]
    assert lines[3].startswith(f"A: {a}: 50 of 60 images, data ")
    assert lines[4] == f"   inception, weights {'0' * 64}, 8 px"
    assert lines[-1] == "note: subsets of 50 images instead of 1000: there are no more."


def test_adms_file_gives_all_metrics(net: ToyNet, command: Any, a: Path, adm: Path) -> None:
    metrics = "fid,sfid,is,precision,recall"
    found = json.loads(command(a, adm, "--metrics", metrics, "--json"))
    assert list(found["metrics"]) == metrics.split(",")
    assert found["metrics"]["recall"]["details"]["num_reference"] == 30
    assert found["B"]["num"] is None
    assert found["B"]["weights_sha256"] == "unknown"
    assert "taken on trust" in found["metrics"]["fid"]["details"]["notes"][0]


def test_saved_statistics_say_the_same(net: ToyNet, command: Any, a: Path, b: Path, tmp_path: Path) -> None:
    direct = json.loads(command(a, b, "--save", tmp_path / "stats.npz", "--json"))
    calls = len(net.calls)
    with np.load(tmp_path / "stats.npz") as file:
        assert file["mu"].shape == (3,)
    command(b, a, "--save", tmp_path / "other.npz")
    net.calls.clear()
    again = json.loads(command(tmp_path / "stats.npz", tmp_path / "other.npz", "--json"))
    assert calls
    assert net.calls == []  # statistics need no network
    assert again["metrics"] == direct["metrics"]
    assert again["A"]["data"] == direct["A"]["data"]


def test_cache_spares_the_network(net: ToyNet, command: Any, a: Path, b: Path, tmp_path: Path) -> None:
    first = command(a, b, "--metrics", "fd,precision", "--cache", tmp_path / "cache")
    net.calls.clear()
    assert command(a, b, "--metrics", "fd,precision", "--cache", tmp_path / "cache") == first
    assert net.calls == []
    command(a, b, "--cache", tmp_path / "cache", "--num", "40")
    assert net.calls == [40, 40]


def test_the_order_of_a_folder_is_noted_with_the_inception_score(
    net: ToyNet, command: Any, a: Path, b: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(some_images(12)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")

    def noted(*arguments: str | Path) -> bool:
        return "note: inception score: its parts" in command(*arguments, "--feature-net", "inception")

    assert noted(tmp_path / "folder", b, "--metrics", "is,fid")
    assert not noted(tmp_path / "folder", b, "--metrics", "fid")
    assert not noted(a, tmp_path / "folder", "--metrics", "is")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    net: ToyNet, command: Any, a: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path / "folder.npz", "is a folder"),
        (tmp_path / "file" / "a.npz", "cannot be written"),
        (Path("/proc/a.npz"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            command(a, a, "--save", place)
    assert net.calls == []
    command(a, a, "--save", tmp_path / "new" / "a.npz")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fid"], "'fid' is of Inception-v3's features, not efflite0's: use --feature-net inception"),
        (["--metrics", "is"], "'is' is of class probabilities, which efflite0 does not give"),
        (["--metrics", "ssim"], "unknown metric 'ssim'"),
        (["--metrics", ","], "no metric is asked for"),
        (["--num", "61"], "--num 61: A has 60 images"),
        (["--num", "1"], "--num 1: .*use 2 or more"),
        (["--save", "stats.npy"], r"--save stats.npy must end in \.npz"),
        (["--device", "gpu"], "--device gpu: cpu, cuda or such as cuda:1"),
        (["--device", "cuda:99"], "--device cuda:99: there are "),
    ],
)
def test_requests_that_are_refused(
    net: ToyNet, command: Any, a: Path, b: Path, arguments: list[str], message: str
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        command(a, b, *arguments)
    assert net.calls == []


def test_statistics_that_are_refused(net: ToyNet, command: Any, a: Path, adm: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "fid_stats.npz"
    np.savez(foreign, mu=np.zeros(3), sigma=np.eye(3))
    for metric, what in (("kid", "features of single images"), ("sfid", "spatial features")):
        with pytest.raises(UserError, match=rf"'{metric}' needs .*{what}.*, which B \(.*fid_stats"):
            command(a, foreign, "--metrics", metric)
    with pytest.raises(UserError, match=r"'is' needs class probabilities, which A \(.*fid_stats"):
        command(foreign, adm, "--metrics", "is")
    with pytest.raises(UserError, match="--num 5: A and B are statistics"):
        command(foreign, adm, "--num", "5")
    np.savez(foreign, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match=r"5 dimensions, Inception-v3's pooled features have 3: .*--feature-net"):
        command(a, foreign)
    command(a, a, "--save", tmp_path / "ours.npz")
    with pytest.raises(UserError, match="net 'efflite0' against 'inception'"):
        command(a, tmp_path / "ours.npz", "--feature-net", "inception")
    command(a, a, "--save", tmp_path / "other.npz", "--feature-net", "inception")
    with pytest.raises(UserError, match="A is of the feature net efflite0, B of inception"):
        command(tmp_path / "ours.npz", tmp_path / "other.npz")
    assert net.calls
    net.weights_sha256 = "1" * 64
    with pytest.raises(UserError, match=r"weights_sha256 .* against"):
        command(a, tmp_path / "ours.npz")


def test_the_command_itself(a: Path, b: Path) -> None:
    """With the real network, once."""
    command = [sys.executable, "-m", "evaluation.frechet", str(a), str(b), "--num", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fd_efflite0  ")
    assert "note: 8 samples and 8 reference images are no more than the 1280 dimensions" in done.stdout
