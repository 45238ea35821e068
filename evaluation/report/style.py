"""Names, units and number formats shared by figures and tables."""

from __future__ import annotations

_METRICS = {"nll": "NLL (bits/dim)", "fid": "FID"}
_NETS = {"efflite0": "EfficientNet-Lite0", "inception": "Inception-v3"}
_SPLITS = {"test": "held-out images", "train": "training images"}


def metric_label(metric: str) -> str:
    """A metric's name with its unit."""
    if metric.startswith("fd_"):
        net = metric.removeprefix("fd_")
        return f"Fréchet distance ({_NETS.get(net, net)})"
    return _METRICS.get(metric, metric)


def split_label(split: str) -> str:
    """A split in words."""
    return _SPLITS.get(split, split)


def size_label(num_params: int) -> str:
    """A parameter count to three digits: 1.68 M; `unknown size` for 0."""
    if num_params == 0:
        return "unknown size"
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if num_params >= factor:
            return f"{num_params / factor:.3g} {unit}"
    return str(num_params)
