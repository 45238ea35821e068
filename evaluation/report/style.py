"""Names, units and number formats shared by figures and tables."""

from __future__ import annotations

_METRICS = {
    "nll": "NLL (bits/dim)", "nll_gap": "NLL, held-out less training images (bits/dim)",
    "fid": "FID", "sfid": "sFID", "is": "inception score", "kid": "KID",
    "accuracy": "accuracy", "top5_accuracy": "top-5 accuracy", "cross_entropy": "cross-entropy (nats)",
    "precision": "precision", "recall": "recall", "memorisation": "distance to training images, of held-out's",
}  # fmt: skip
_KINDS = {
    "fd": "Fréchet distance", "sfd": "spatial Fréchet distance", "kd": "kernel distance", "precision": "precision",
    "recall": "recall",
}  # fmt: skip
_NETS = {"efflite0": "EfficientNet-Lite0", "inception": "Inception-v3"}
_FORMS = {"power": "power law", "power_constant": "power + constant", "broken": "broken power law"}
_SPLITS = {"test": "held-out images", "train": "training images"}


def metric_label(metric: str) -> str:
    """A metric's name with its unit."""
    kind, _, net = metric.partition("_")
    if kind in _KINDS and net:
        return f"{_KINDS[kind]} ({_NETS.get(net, net)})"
    return _METRICS.get(metric, metric)


def is_fitted(metric: str) -> bool:
    """Whether a law is sought for it: likelihoods and distances fall towards a constant, scores and shares do not."""
    return metric.partition("_")[0] in ("nll", "fd", "fid", "sfd", "sfid")


def is_difference(metric: str) -> bool:
    """Whether it may be negative: then it has no logarithm and no law."""
    return metric.endswith("_gap")


def split_label(split: str) -> str:
    """A split in words."""
    return _SPLITS.get(split, split)


def law_title(metric: str, split: str) -> str:
    """What is measured, and on which images."""
    return f"{metric_label(metric)}, {split_label(split)}" if split else metric_label(metric)


def form_label(form: str) -> str:
    """The name of a form of the law."""
    return _FORMS.get(form, form.replace("_", " "))


def status_label(status: str) -> str:
    """A status in words."""
    return status.replace("_", " ")


def size_label(num_params: int) -> str:
    """A parameter count to three digits: 1.68 M; `unknown size` for 0."""
    if num_params == 0:
        return "unknown size"
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if num_params >= factor:
            return f"{num_params / factor:.3g} {unit}"
    return str(num_params)
