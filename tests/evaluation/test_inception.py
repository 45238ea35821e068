"""FID's Inception-v3: the public weights layout, the network, TensorFlow 1's resize, and how weights are had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inception_layout import layout
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import DataError, UserError
from evaluation.features import download, get_feature_net, identity_of, inception
from evaluation.features.tf1_resize import resize_bilinear_tf1

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Random weights in the public layout, scaled so that activations keep their size through the layers."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in layout().items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values *= (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            values = torch.rand(shape, generator=generator) + 0.5
        elif name != "fc.bias":
            values *= 0.2
        weights[name] = values
    return weights


@pytest.fixture(scope="module")
def weights(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def noise(num: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (num, channels, height, width), dtype=torch.uint8, generator=generator)


# --- the weights layout


def test_layout_is_the_public_one() -> None:
    assert inception.InceptionV3().public_layout() == layout()
    assert len(layout()) == 94 * 5 + 2


def test_counters_of_batches_may_be_there(state: State) -> None:
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in state if "_var" in name}
    assert len(counters) == 94
    inception.InceptionV3().load_published(state | counters)


def test_other_layouts_are_refused_with_all_that_differs(state: State) -> None:
    torchvisions = state | {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1000)}
    del torchvisions["Mixed_6d.branch1x1.bn.running_mean"]
    with pytest.raises(UserError, match=r"not in the public layout") as error:
        inception.InceptionV3().load_published(torchvisions)
    assert "1 missing: Mixed_6d.branch1x1.bn.running_mean" in str(error.value)
    assert "1 not of this network: AuxLogits.fc.bias" in str(error.value)
    assert "1 of another shape: fc.weight is (1000, 2048), expected (1008, 2048)" in str(error.value)


# --- the network

# Of each block the branches, in the order of their channels: convolutions one after the other, `/2` marks a stride of 2
# without padding, `a b` two of one input side by side.
SMALL = ["branch1x1"], ["branch5x5_1", "branch5x5_2"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
LARGE = (
    ["branch1x1"],
    ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
    [f"branch7x7dbl_{number}" for number in (1, 2, 3, 4, 5)],
)
WIDE = (
    ["branch1x1"],
    ["branch3x3_1", "branch3x3_2a branch3x3_2b"],
    ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a branch3x3dbl_3b"],
)
BLOCKS = {
    **{f"Mixed_5{x}": (*SMALL, ["mean", "branch_pool"]) for x in "bcd"},
    "Mixed_6a": (["branch3x3/2"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/2"], ["max/2"]),
    **{f"Mixed_6{x}": (*LARGE, ["mean", "branch_pool"]) for x in "bcde"},
    "Mixed_7a": (
        ["branch3x3_1", "branch3x3_2/2"],
        ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4/2"],
        ["max/2"],
    ),
    "Mixed_7b": (*WIDE, ["mean", "branch_pool"]),
    "Mixed_7c": (*WIDE, ["max", "branch_pool"]),
}


def reference_layer(state: State, x: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
    """Convolution, batch norm and ReLU, unfolded."""
    weight = state[f"{name}.conv.weight"]
    padding = (weight.shape[2] // 2, weight.shape[3] // 2) if padded else 0
    norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.relu(F.batch_norm(F.conv2d(x, weight, stride=stride, padding=padding), *norm, eps=1e-3))  # type: ignore[arg-type]


def reference_mean(x: Tensor) -> Tensor:
    """Mean over the pixels of a 3x3 window that lie within the image."""
    window = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    total = F.conv2d(x.flatten(0, 1)[:, None], window, padding=1)
    num = F.conv2d(torch.ones_like(x[:1, :1]), window, padding=1)
    return (total / num).reshape(x.shape)


def reference_block(state: State, x: Tensor, block: str) -> Tensor:
    branches = []
    for branch in BLOCKS[block]:
        y = x
        for step in branch:
            name, halves = step.removesuffix("/2"), step.endswith("/2")
            if name == "max":
                y = F.max_pool2d(y, 3, 2) if halves else F.max_pool2d(y, 3, 1, 1)
            elif name == "mean":
                y = reference_mean(y)
            else:
                layers = [f"{block}.{part}" for part in name.split()]
                stride = 2 if halves else 1
                y = torch.cat([reference_layer(state, y, layer, stride, not halves) for layer in layers], dim=1)
        branches.append(y)
    return torch.cat(branches, dim=1)


def reference_network(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 299, 299] -> pooled features, output of the layer that the graph calls `mixed_6/conv`."""
    x = reference_layer(state, x, "Conv2d_1a_3x3", stride=2, padded=False)
    x = reference_layer(state, x, "Conv2d_2a_3x3", padded=False)
    x = F.max_pool2d(reference_layer(state, x, "Conv2d_2b_3x3"), 3, 2)
    x = reference_layer(state, x, "Conv2d_3b_1x1")
    x = F.max_pool2d(reference_layer(state, x, "Conv2d_4a_3x3", padded=False), 3, 2)
    graph_blocks = dict(zip(["mixed", *(f"mixed_{number}" for number in range(1, 11))], BLOCKS, strict=True))
    spatial = torch.zeros(0)
    for graph_block, block in graph_blocks.items():
        if graph_block == "mixed_6":
            spatial = reference_layer(state, x, f"{block}.branch1x1")
        x = reference_block(state, x, block)
    assert x.shape[1:] == (2048, 8, 8)
    return x.mean(dim=(2, 3)), spatial


def test_network_is_its_definition(state: State) -> None:
    """All blocks, in float64, where only rounding could differ; the reference folds nothing."""
    exact = {name: value.double() for name, value in state.items()}
    net = inception.InceptionV3().double()
    net.load_published(state)
    x = torch.randn(1, 3, 299, 299, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pool, middle = net(x)
        expected_pool, expected_spatial = reference_network(exact, x)
    spatial = inception.spatial_features(middle)
    channels_last = [
        expected_spatial[0, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)
    ]
    assert torch.allclose(pool, expected_pool, rtol=1e-10, atol=0)
    assert spatial.shape == (1, inception.SPATIAL_DIM)
    assert torch.allclose(spatial[0], torch.stack(channels_last), rtol=1e-9, atol=1e-12)
    assert (spatial > 0).any()


def test_features_of_images(weights: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "CHUNK", {"cpu": 2})
    net = get_feature_net("inception", weights=weights)
    images = noise(3, 40, 40)
    features = net(images)
    assert features.spatial is not None
    assert features.probs is not None
    assert features.pool.shape == (3, net.dim)
    assert features.spatial.shape == (3, net.spatial_dim)
    assert features.probs.shape == (3, net.num_classes)
    assert {features.pool.dtype, features.spatial.dtype, features.probs.dtype} == {torch.float32}
    # The inception score's convention: without the bias, which is large here.
    logits = features.pool.double() @ state["fc.weight"].double().T
    assert torch.allclose(features.probs.double(), logits.softmax(dim=1), atol=1e-5)
    first = net(images[:2])
    assert torch.equal(first.pool, features.pool[:2])  # the chunks that it works in
    assert first.spatial is not None
    assert torch.equal(first.spatial, features.spatial[:2])


def test_images_are_resized_and_scaled_before_the_network(weights: Path) -> None:
    net = inception.load(weights)
    seen: list[Tensor] = []
    net.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    images = noise(1, 32, 32)
    net(images)
    assert torch.equal(seen[0], (resize_bilinear_tf1(images, 299) - 128) * 0.0078125)


def test_identity_and_names(weights: Path) -> None:
    net = get_feature_net("inception", weights=weights)
    identity = identity_of(net)
    assert (identity.net, identity.resize) == ("inception", 299)
    assert identity.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(DataError, match="a feature net takes uint8 images"):
        net(noise(1, 32, 32, channels=1))


# --- TensorFlow 1's resize


def scalar_resize(plane: NDArray[np.uint8], row: int, column: int, size: int) -> np.float32:
    """One pixel by the definition, one float32 operation after the other."""
    lows, highs, fractions = [], [], []
    for position, length in ((row, plane.shape[0]), (column, plane.shape[1])):
        scale = np.float32(length) / np.float32(size)
        source = np.float32(position) * scale
        lows.append(int(np.floor(source)))
        highs.append(min(lows[-1] + 1, length - 1))
        fractions.append(source - np.float32(lows[-1]))
    (top, left), (bottom, right), (dy, dx) = lows, highs, fractions
    corner = {(y, x): np.float32(plane[y, x]) for y in (top, bottom) for x in (left, right)}
    above = corner[top, left] + (corner[top, right] - corner[top, left]) * dx
    below = corner[bottom, left] + (corner[bottom, right] - corner[bottom, left]) * dx
    return np.float32(above + (below - above) * dy)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, 299),
        (64, 64, 299),
        (256, 256, 299),
        (299, 299, 299),
        (512, 512, 299),
        (100, 333, 299),
        (7, 7, 23),
        (23, 23, 7),
    ],
)
def test_resize_is_tensorflow_1s_to_the_bit(height: int, width: int, size: int) -> None:
    images = noise(2, height, width)
    resized = resize_bilinear_tf1(images, size)
    assert resized.shape == (2, 3, size, size)
    assert resized.dtype == torch.float32
    rng = np.random.default_rng(0)
    pixels = [(row, column) for row in range(size) for column in range(size)]
    chosen = rng.choice(len(pixels), min(len(pixels), 1500), replace=False)
    corners = [(row, column) for row in (0, size - 1) for column in (0, size - 1)]
    for row, column in [*corners, *(pixels[index] for index in chosen)]:
        image, channel = int(rng.integers(2)), int(rng.integers(3))
        expected = scalar_resize(images[image, channel].numpy(), row, column, size)
        assert resized[image, channel, row, column].numpy().tobytes() == expected.tobytes()


# --- where weights come from


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.usefixtures("home")
def test_download_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "net-2015.pth"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    path = download.cached_download(source.as_uri(), sha256=digest, what="The net")
    assert path == download.cache_folder() / "net-2015.pth"
    source.unlink()
    assert download.cached_download(source.as_uri(), sha256=digest, what="The net") == path
    assert path.read_bytes() == b"weights"


def test_wrong_download_is_not_kept(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "net-2015.pth"
    source.write_bytes(b"an error page")
    with pytest.raises(UserError, match=r"wrong checksum(.|\n)*--feature-weights FILE"):
        download.cached_download(source.as_uri(), sha256="0" * 64, what="The net")
    assert not [path for path in home.rglob("*") if path.suffix in (".pth", ".part")]


@pytest.mark.usefixtures("home")
def test_weights_that_cannot_be_had_name_their_source_and_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = (tmp_path / "pt_inception-2015-12-05-6726825d.pth").as_uri()
    monkeypatch.setattr(inception, "URL", absent)
    with pytest.raises(
        UserError, match=r"FID's Inception-v3 could not be downloaded(.|\n)*--feature-weights FILE"
    ) as error:
        get_feature_net("inception")
    assert absent in str(error.value)


@pytest.mark.usefixtures("home")
def test_published_weights_must_be_the_published_ones(weights: Path) -> None:
    cached = download.cache_folder() / inception.URL.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    with pytest.raises(UserError, match=r"has sha256 .*, not the published 6726825d"):
        get_feature_net("inception")
    assert inception.SHA256[:8] in inception.URL


def test_unusable_weights_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--feature-weights .*nowhere.pth: there is no such file"):
        inception.load(tmp_path / "nowhere.pth")
    damaged = tmp_path / "damaged.pth"
    for content in (b"", b"<html>not found</html>", b"PK\x03\x04 cut short"):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="damaged or no PyTorch weights file"):
            inception.load(damaged)
    torch.save([1, 2], damaged)
    with pytest.raises(UserError, match="something else than named tensors"):
        inception.load(damaged)


def test_a_weights_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"fc.weight": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="damaged or no PyTorch weights file"):
        inception.load(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
