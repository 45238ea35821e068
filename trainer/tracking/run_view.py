"""What a run folder tells a tracker beside its metrics: parameters, tags, data sets, files. Plain data, no mlflow.

No credential leaves the folder: see `public_text` and `flatten`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.tracking.points import flatten, records_by_name
from trainer.tracking.records import FLOP_CONVENTION, EvalRecord, Evaluation
from trainer.tracking.uri import is_secret, public_place

# And the metric's name. The UI shows no tags of this prefix: these are long, and for `mlflow_points` to read.
MEASURED_TAG = "mlflow.measured."
_ABOUT = ("seed", "num_params", "flops_per_image", "data_fingerprint")
_DIGEST_LENGTH = 32  # of MLflow's 36 characters


@dataclass(frozen=True)
class DataSet:
    """A data set that a run has read."""

    name: str  # the last two parts of its address: cifar10/train
    digest: str  # the beginning of its fingerprint
    source_type: str  # local, s3, https, ...
    source: dict[str, str]  # address and whole fingerprint
    shape: tuple[int, ...]  # of an image: height, width, channels; empty where it isn't known
    context: str  # "train" or "eval"


def run_config(folder: Path) -> dict[str, Any]:
    """The run's resolved config; empty where there is none yet."""
    path = folder / "config.yaml"
    return dict(yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def public_config(config: Mapping[str, Any]) -> str:
    """The config as YAML without anything that may hold a credential."""
    return yaml.safe_dump(_public(config), sort_keys=False)


def run_params(config: Mapping[str, Any]) -> dict[str, str]:
    """The config as `section.key` -> text."""
    return flatten(_public(config)) if config else {}


def run_tags(about: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """What the run is, and, for each metric's name, what exactly was measured of which data.

    With these tags and the metrics themselves an evaluated point can be rebuilt from the tracker alone.
    """
    tags = {name: str(about[name]) for name in _ABOUT if name in about}
    tags |= {"kind": "trial", "drawn": "yes", "flop_convention": FLOP_CONVENTION}
    tags |= {"mlflow.note.content": _description(about)} if "num_params" in about else {}
    for key, records in records_by_name(r for evaluation in evaluations for r in evaluation.records).items():
        tags[MEASURED_TAG + key] = _measured(records)
    return tags | {str(key): str(value) for key, value in about.get("tags", {}).items()}


def data_sets(
    about: Mapping[str, Any], config: Mapping[str, Any], evaluations: Iterable[Evaluation]
) -> dict[str, DataSet]:
    """The data that the run was trained on and evaluated with, by a key of its own."""
    size = config.get("model", {}).get("image_size")
    shape = (size, size, 3) if isinstance(size, int) else ()
    train = config.get("data", {}).get("train")
    found = []
    if train and about.get("data_fingerprint"):
        found.append(_data_set(str(train), about["data_fingerprint"], shape, "train"))
    for evaluation in evaluations:
        fingerprints = dict.fromkeys(record.data for record in evaluation.records)
        found += [_data_set(evaluation.data, data, shape, "eval") for data in fingerprints if evaluation.data]
    return {f"{data.name} {data.digest}": data for data in reversed(found)}  # trained on counts before evaluated with


def run_files(folder: Path, evaluations: Iterable[Evaluation]) -> Iterator[tuple[Path, str | None]]:
    """Files to be shown, with their folder among the artifacts."""
    yield from ((path, "samples") for path in sorted(folder.glob("samples/*.png")))
    if (folder / "evals" / "metrics.txt").exists():
        yield folder / "evals" / "metrics.txt", "evals"
    for evaluation in evaluations:  # its pictures and arrays were there before it
        where = f"evals/{evaluation.path.parent.name}/{evaluation.name}"
        yield from ((path, where) for path in sorted(evaluation.path.with_suffix("").glob("*")))


def _description(about: Mapping[str, Any]) -> str:
    flops = f", {about['flops_per_image']:.4g} training FLOPs an image" if "flops_per_image" in about else ""
    return (
        f"{about['num_params']:,} parameters{flops}, seed {about.get('seed', 0)}. Steps are images seen; the "
        "evaluations have the training compute so far in `compute`; their copies `by GFLOP` have it as the step."
    )


def _measured(records: Sequence[EvalRecord]) -> str:
    """What was measured, as a JSON list: one entry, or, where it was not always the same, several with their images."""
    ways: dict[str, list[int]] = {}
    for record in records:
        way = {"data": record.data, "measured": record.way, "flop_convention": record.flop_convention}
        ways.setdefault(json.dumps(way, sort_keys=True), []).append(record.nimg)
    entries = [json.loads(way) | {"images": images} for way, images in ways.items()]
    return json.dumps([entries[0] | {"images": None}] if len(entries) == 1 else entries)


def _data_set(place: str, fingerprint: str, shape: tuple[int, ...], context: str) -> DataSet:
    place = public_place(place)
    name = "/".join(place.rstrip("/").split("/")[-2:])
    kind = place.partition("://")[0] if "://" in place else "local"
    source = {"uri": place, "fingerprint": fingerprint}
    return DataSet(name, fingerprint[:_DIGEST_LENGTH], kind, source, shape, context)


def _public(tree: Any) -> Any:
    """A config without addresses of trackers and anything named as a secret, and URLs without their credentials."""
    if isinstance(tree, Mapping):
        return {key: _public(value) for key, value in tree.items() if not is_secret(str(key))}
    if isinstance(tree, (list, tuple)):
        return [_public(value) for value in tree]
    return public_place(tree) if isinstance(tree, str) else tree
