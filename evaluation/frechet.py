"""Compare two sets of images by the features of a network: FID, sFID, IS, KID, precision and recall.

    python -m evaluation.frechet samples.npz data/cifar10/test
    python -m evaluation.frechet samples.npz VIRTUAL_imagenet64_labeled.npz --metrics fid,sfid,is,precision,recall \\
        --feature-net inception --feature-weights pt_inception-2015-12-05-6726825d.pth
    python -m evaluation.frechet my_images/ data/imagenet64/train --num 10000 --cache ~/.cache/features --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError, UserError, run_cli
from evaluation.device import pick_device
from evaluation.features import FeatureNet, get_feature_net
from evaluation.features.feature_set import FeatureSet
from evaluation.features.reference import image_features, published_features
from evaluation.image_sets import ImageSet, holds_images, holds_statistics, open_images
from evaluation.quality import INCEPTION, Measured, check_gives, check_kinds, need_rows, quality, record_name
from evaluation.statistics import UNKNOWN, FeatureIdentity, FeatureStats, read_stats, says_its_net, write_stats

DEFAULT_NET = "efflite0"
_ORDER_NOTE = "inception score: its parts are in the order of a folder's files; where that is by class, it is too low."
_INCEPTION_DIM = 2048  # of its pooled features, the only ones whose distance is FID

EPILOG = """\
A is the set of samples and B the reference: IS is A's, precision is of A in B, recall of B in A. Each of them is

  an npz of statistics   ours (see --save), ADM's reference batches (mu, sigma, mu_s, sigma_s; the images in arr_0 are
                         used for kid, precision and recall only), pytorch-fid's (mu, sigma)
  an npz of images       arr_0, uint8 [N, H, W, 3], as evaluation.sample and ADM write them
  a shard folder         a data split such as data/cifar10/test, or samples written as shards
  an image folder        png, jpg, webp, ... at any depth and of any sizes; transparency is laid over white

metrics:
  fd (fid)          Fréchet distance of the features' Gaussians; biased upwards at small N
  sfd (sfid)        the same of Inception's spatial features
  is                inception score of A: mean over ten parts, ± its standard error
  kd (kid)          kernel distance: mean over 100 subsets of 1,000 images, ± its standard error; unbiased
  precision,recall  improved precision and recall, k = 3

The parts of IS are taken in the order of the images, in a folder that of its files. Where classes follow one another
(a folder for each, say), each part holds only some of them and IS comes out too low: give the images in random order.

The names fid, sfid and kid are kept for Inception-v3, the only net whose figures may stand beside published ones.
Another net's are called fd_NET, kd_NET and so on. Without --feature-net, the net is the one that a file of statistics
names; inception where one names none; else efflite0, whose weights are installed with the program. Two files of
statistics need no weights. Exit code 2: what was asked for cannot be had; the message says why.
"""


@dataclass(frozen=True)
class _Input:
    """A or B: either statistics, which may bring images along, or images."""

    side: str
    path: Path
    stats: FeatureStats | None
    images: ImageSet | None


def main() -> int:
    """The command line."""
    a = _parse()
    paths = {"A": a.a, "B": a.b}
    net_name = a.feature_net or _net_of(paths)
    kinds = check_kinds([name for name in a.metrics.split(",") if name], net_name)
    inputs = [_open(side, path, net_name, kinds) for side, path in paths.items()]
    _check_num(a.num, inputs)
    _check_save(a.save)
    device = _device(a.device)
    with_rows = need_rows(kinds)
    net = None
    if with_rows or any(one.images is not None for one in inputs):
        net = get_feature_net(net_name, device=str(device), weights=a.feature_weights)
    samples, reference = (_features(one, net, num=a.num, cache=a.cache, with_rows=with_rows) for one in inputs)
    found = quality(samples, reference, kinds, device=str(device))
    if "is" in found and a.a.is_dir():
        found["is"] = _noted(found["is"], _ORDER_NOTE)
    if a.save is not None:
        write_stats(a.save, samples.stats)
    values = {record_name(kind, net_name): value for kind, value in found.items()}
    account = {one.side: _account(one, features) for one, features in zip(inputs, (samples, reference), strict=True)}
    if a.json:
        json.dump({"metrics": {name: asdict(value) for name, value in values.items()}, **account}, sys.stdout, indent=2)
        print()
    else:
        print(_text(values, account))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.frechet", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", metavar="A", type=Path, help="the samples: an npz or a folder, see below")
    parser.add_argument("b", metavar="B", type=Path, help="what they are compared with")
    parser.add_argument("--metrics", default="fd", help="comma-separated, see below (default: fd)")
    parser.add_argument("--feature-net", help="efflite0 or inception (default: see below); of statistics, any name")
    parser.add_argument(
        "--feature-weights", type=Path, metavar="FILE", help="the net's weights (inception: downloaded if left out)"
    )
    parser.add_argument("--num", type=int, metavar="N", help="use N images of each set, spread over it (default: all)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the features of images here")
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="write the statistics of A")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON: metrics, and what A and B are")
    return parser.parse_args()


def _net_of(paths: dict[str, Path]) -> str:
    """The net that files of statistics are of, Inception for those that do not say; without such files the default."""
    named = {side: says_its_net(path) for side, path in paths.items() if holds_statistics(path)}
    nets = sorted({net for net in named.values() if net is not None})
    if len(nets) > 1:
        raise DataError(f"A is of the feature net {named['A']}, B of {named['B']}: they cannot be compared.")
    return nets[0] if nets else INCEPTION if named else DEFAULT_NET


def _open(side: str, path: Path, net: str, kinds: tuple[str, ...]) -> _Input:
    """Raises DataError for what is no set of images, or cannot give one of the metrics."""
    if not holds_statistics(path):
        return _Input(side, path, None, open_images(path))
    stats = read_stats(path, identity=FeatureIdentity(net, UNKNOWN, 0))
    if net == INCEPTION and stats.pool.dim != _INCEPTION_DIM:
        raise DataError(
            f"{side} ({path}) holds statistics of {stats.pool.dim} dimensions, Inception-v3's pooled features have "
            f"{_INCEPTION_DIM}: name the net that they are of with --feature-net."
        )
    whose = f"{side} ({path})"
    check_gives(stats, kinds, has_rows=holds_images(path), whose=whose, is_reference=side == "B")
    return _Input(side, path, stats, None)


def _features(
    one: _Input, net: FeatureNet | None, *, num: int | None, cache: Path | None, with_rows: bool
) -> FeatureSet:
    title = "" if net is None else f"{net.name} features of {one.side}"
    if one.images is not None:
        assert net is not None
        return image_features(one.images, net, num=num, cache=cache, title=title)
    if net is None:
        assert one.stats is not None
        return FeatureSet(one.stats, None)
    return published_features(one.path, net, with_rows=with_rows, cache=cache, title=title)


def _check_num(num: int | None, inputs: list[_Input]) -> None:
    if num is None:
        return
    if num < 2:
        raise UserError(f"--num {num}: sets of images are compared; use 2 or more.")
    sets = {one.side: one.images for one in inputs if one.images is not None}
    if not sets:
        raise UserError(f"--num {num}: A and B are statistics, whose number of images is fixed; leave it out.")
    for side, images in sets.items():
        if len(images) < num:
            raise UserError(f"--num {num}: {side} has {len(images)} images.")


def _check_save(save: Path | None) -> None:
    """Make the folder and see that it can be written to, before there is work to lose."""
    if save is None:
        return
    if save.suffix != ".npz":
        raise UserError(f"--save {save} must end in .npz.")
    if save.is_dir():
        raise UserError(f"--save {save} is a folder; name a file that is to be made.")
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=save.parent, prefix="."):
            pass
    except OSError as error:
        raise UserError(f"--save {save} cannot be written ({error}): name another place.") from None


def _device(name: str | None) -> torch.device:
    picked = pick_device()
    try:
        device = picked if name is None else torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: cpu, cuda or such as cuda:1 is expected.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here.")
    return device


def _noted(measured: Measured, note: str) -> Measured:
    return replace(measured, details=measured.details | {"notes": [*measured.details.get("notes", []), note]})


def _account(one: _Input, features: FeatureSet) -> dict[str, Any]:
    """What a set is; None stands for what is not known."""
    return {
        "path": str(one.path),
        "num": features.num or None,
        "of": features.num or None if one.images is None else len(one.images),  # images that `data` is of
        "data": features.data or None,
        "net": features.identity.net,
        "weights_sha256": features.identity.weights_sha256,
        "resize": features.identity.resize or None,
    }


def _text(values: dict[str, Measured], account: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        error = "" if value.stderr is None else f" ± {value.stderr:.2g}"
        lines.append(f"{name:<{width}}  {value.value:.6g}{error}")
    for side, what in account.items():
        of = "" if what["of"] == what["num"] else f" of {what['of']:,}"
        num = f"{what['num']:,}{of} images" if what["num"] else "number of images not said"
        resize = f", {what['resize']} px" if what["resize"] else ""
        lines.append(f"{side}: {what['path']}: {num}, data {what['data'] or UNKNOWN}")
        lines.append(f"   {what['net']}, weights {what['weights_sha256']}{resize}")
    notes = dict.fromkeys(note for value in values.values() for note in value.details.get("notes", []))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


if __name__ == "__main__":
    run_cli(main)
