"""Inception-v3 as FID means it (`inception`): TensorFlow's graph of 2015-12-05, in PyTorch.

Szegedy et al. 2015, "Rethinking the Inception Architecture" (arXiv:1512.00567); Heusel et al. 2017, "GANs Trained by a
Two Time-Scale Update Rule" (arXiv:1706.08500) made its pooled features the measure of samples. It is not torchvision's
`inception_v3`: other weights, 1008 classes, average pools that leave their padding out of the mean, and a max pool in
the last block.

The weights are the public port `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, whose names the modules below
bear. Batch norms are folded into the convolutions when they are loaded, in float64: the network is convolutions, ReLU
and pools only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.files import sha256_file
from evaluation.features import Features
from evaluation.features.batch_norm import fold_batch_norm
from evaluation.features.checks import check_images
from evaluation.features.download import cached_download
from evaluation.features.tf1_resize import resize_bilinear_tf1

NAME = "inception"
DIM = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
RESIZE = 299  # pixels
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")  # its tensors in the file
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the file at URL, 95.6 MB
# Images at once. A fixed number keeps a feature from depending on how the caller cut its batches.
CHUNK = {"cpu": 8}
ACCELERATOR_CHUNK = 128


class ConvRelu(nn.Conv2d):
    """Convolution with a bias (which holds the batch norm), then ReLU.

    With stride 1 it keeps the image's size unless `valid` is set; with stride 2 it never pads.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride > 1 else (height // 2, width // 2)
        super().__init__(channels_in, channels_out, (height, width), stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    """Mean over 3x3 pixels, at the border over those that there are."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """Maximum over 3x3 pixels."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    """Maximum over 3x3 pixels, every second one."""
    return F.max_pool2d(x, 3, stride=2)


class InceptionA(nn.Module):
    """35x35: [N, channels_in, 35, 35] -> [N, 224 + channels_pool, 35, 35]."""

    def __init__(self, channels_in: int, channels_pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvRelu(channels_in, 64, 1)
        self.branch5x5_1 = ConvRelu(channels_in, 48, 1)
        self.branch5x5_2 = ConvRelu(48, 64, 5)
        self.branch3x3dbl_1 = ConvRelu(channels_in, 64, 1)
        self.branch3x3dbl_2 = ConvRelu(64, 96, 3)
        self.branch3x3dbl_3 = ConvRelu(96, 96, 3)
        self.branch_pool = ConvRelu(channels_in, channels_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.branch5x5_2(self.branch5x5_1(x))
        large = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), small, large, self.branch_pool(average_pool(x))], dim=1)


class InceptionB(nn.Module):
    """Halves the image: [N, 288, 35, 35] -> [N, 768, 17, 17]."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvRelu(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvRelu(288, 64, 1)
        self.branch3x3dbl_2 = ConvRelu(64, 96, 3)
        self.branch3x3dbl_3 = ConvRelu(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        large = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), large, halve(x)], dim=1)


class InceptionC(nn.Module):
    """17x17, with 7x7 convolutions as pairs of a row and a column: [N, 768, 17, 17] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvRelu(768, 192, 1)
        self.branch7x7_1 = ConvRelu(768, channels, 1)
        self.branch7x7_2 = ConvRelu(channels, channels, row)
        self.branch7x7_3 = ConvRelu(channels, 192, column)
        self.branch7x7dbl_1 = ConvRelu(768, channels, 1)
        self.branch7x7dbl_2 = ConvRelu(channels, channels, column)
        self.branch7x7dbl_3 = ConvRelu(channels, channels, row)
        self.branch7x7dbl_4 = ConvRelu(channels, channels, column)
        self.branch7x7dbl_5 = ConvRelu(channels, 192, row)
        self.branch_pool = ConvRelu(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        large = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        large = self.branch7x7dbl_5(self.branch7x7dbl_4(large))
        return torch.cat([self.branch1x1(x), small, large, self.branch_pool(average_pool(x))], dim=1)


class InceptionD(nn.Module):
    """Halves the image: [N, 768, 17, 17] -> [N, 1280, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvRelu(768, 192, 1)
        self.branch3x3_2 = ConvRelu(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvRelu(768, 192, 1)
        self.branch7x7x3_2 = ConvRelu(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvRelu(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvRelu(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_2(self.branch7x7x3_1(x))
        large = self.branch7x7x3_4(self.branch7x7x3_3(large))
        return torch.cat([small, large, halve(x)], dim=1)


class InceptionE(nn.Module):
    """8x8, whose 3x3 branches end in a row and a column side by side: [N, channels_in, 8, 8] -> [N, 2048, 8, 8]."""

    def __init__(self, channels_in: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = ConvRelu(channels_in, 320, 1)
        self.branch3x3_1 = ConvRelu(channels_in, 384, 1)
        self.branch3x3_2a = ConvRelu(384, 384, row)
        self.branch3x3_2b = ConvRelu(384, 384, column)
        self.branch3x3dbl_1 = ConvRelu(channels_in, 448, 1)
        self.branch3x3dbl_2 = ConvRelu(448, 384, 3)
        self.branch3x3dbl_3a = ConvRelu(384, 384, row)
        self.branch3x3dbl_3b = ConvRelu(384, 384, column)
        self.branch_pool = ConvRelu(channels_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.branch3x3_1(x)
        large = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        rows_and_columns = [
            self.branch3x3_2a(small), self.branch3x3_2b(small),
            self.branch3x3dbl_3a(large), self.branch3x3dbl_3b(large),
        ]  # fmt: skip
        return torch.cat([self.branch1x1(x), *rows_and_columns, self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """The network with its batch norms folded: images [N, 3, 299, 299] in -1..127/128 -> pooled features, Mixed_6d."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvRelu(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvRelu(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvRelu(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvRelu(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvRelu(80, 192, 3, valid=True)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB()
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, max_pool)
        self.fc = nn.Linear(DIM, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))  # [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))  # [N, 288, 35, 35]
        middle: Tensor = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [N, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(middle))))  # [N, 2048, 8, 8]
        return x.mean(dim=(2, 3)), middle

    def convolutions(self) -> Iterator[tuple[str, ConvRelu]]:
        """All convolutions with their public names."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, ConvRelu))

    def public_layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in the public weights file (which may hold `num_batches_tracked` besides)."""
        layout = {f"fc.{name}": tuple(value.shape) for name, value in self.fc.named_parameters()}
        for name, conv in self.convolutions():
            layout[f"{name}.conv.weight"] = tuple(conv.weight.shape)
            for norm in BATCH_NORM:
                layout[f"{name}.bn.{norm}"] = (conv.out_channels,)
        return layout

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the public file's weights, folding each batch norm into the convolution before it.

        Raises:
            UserError: names all tensors that are missing, left over, or of another shape.
        """
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        _check_layout(state, self.public_layout())
        for name, conv in self.convolutions():
            fold_batch_norm(conv, state[f"{name}.conv.weight"], *(state[f"{name}.bn.{norm}"] for norm in BATCH_NORM))
        self.fc.load_state_dict({name: state[f"fc.{name}"] for name in ("weight", "bias")})


def _check_layout(state: Mapping[str, Tensor], layout: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    other = [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in layout.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = {
        "missing": [name for name in layout if name not in shapes],
        "not of this network": [name for name in shapes if name not in layout],
        "of another shape": other,
    }
    told = [f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names]
    if told:
        raise UserError("the weights are not in the public layout of FID's Inception-v3: " + "; ".join(told))


@dataclass(frozen=True)
class Inception:
    """The feature net `inception`: TF1's bilinear resize to 299, (x - 128) / 128."""

    net: InceptionV3
    weights_sha256: str
    device: str = "cpu"
    name: str = NAME
    dim: int = DIM
    spatial_dim: int = SPATIAL_DIM
    num_classes: int = NUM_CLASSES
    resize: int = RESIZE

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """uint8 images [N, 3, H, W] -> pooled [N, 2048] and spatial features [N, 2023], probabilities [N, 1008]."""
        check_images(images)
        chunk = CHUNK.get(torch.device(self.device).type, ACCELERATOR_CHUNK)
        parts = [self._features(part) for part in torch.split(images, chunk)]
        pool, spatial, probs = (torch.cat(features) for features in zip(*parts, strict=True))
        return Features(pool, spatial, probs)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = resize_bilinear_tf1(images.to(self.device), RESIZE).sub_(128).div_(128)
        pool, middle = self.net(x.contiguous(memory_format=torch.channels_last))
        # The bias is left out, as the inception score's definition does (Salimans et al. 2016, the authors' code: the
        # pooled features times the matrix of `softmax/logits/MatMul`), ADM's evaluator and torch-fidelity after it.
        probs = F.linear(pool, self.net.fc.weight).softmax(dim=1)
        return pool.cpu(), spatial_features(middle).cpu(), probs.cpu()


def spatial_features(middle: Tensor) -> Tensor:
    """Mixed_6d's output [N, 768, 17, 17] -> the features of sFID, [N, 17 * 17 * 7], channels last.

    Nash et al. 2021 (arXiv:2103.03841) and ADM's evaluator take the first 7 channels of the graph's `mixed_6/conv:0`.
    The graph counts its blocks `mixed`, `mixed_1`, ..: its third one of 17x17 after the halving `mixed_3` is `mixed_6`,
    which the converter of the weights (torch-fidelity, `util_convert_inception_weights.py`) calls Mixed_6d; `conv` is
    its 1x1 branch. A node that bears a layer's bare name is the layer's last one, after batch norm: the ReLU. The 1x1
    branch comes first where the branches are joined, so its first channels are the block's. (Some ports of sFID take
    Mixed_6e, which is `mixed_7`.)
    """
    return middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).contiguous()


def load(weights: Path | None = None, *, device: str | torch.device = "cpu") -> Inception:
    """The feature net, with the user's weights file or the published one (downloaded once, checked by its sha256).

    A user's file may be another one of the same layout; its sha256 tells its features from those of the published one.

    Raises:
        UserError: the file is missing, cannot be had, or does not hold this network.
    """
    path = weights if weights is not None else cached_download(URL, sha256=SHA256, what="FID's Inception-v3")
    if not path.is_file():
        raise UserError(f"--feature-weights {path}: there is no such file. The published one is at {URL}.")
    found = sha256_file(path)
    if weights is None and found != SHA256:
        raise UserError(f"{path} has sha256 {found}, not the published {SHA256}: delete it, and it is fetched again.")
    net = InceptionV3()
    net.load_published(_read_weights(path))
    net.eval().requires_grad_(False)
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Inception(net, found, str(device))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or no PyTorch weights file; the published one is at {URL}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds something else than named tensors; the published weights are at {URL}.")
    return state
