"""Make images with trained networks, in one stage or several.

    python -m evaluation.sample RUN/exports/000064000000 --num 64 --respacing 250 --out samples.npz
    python -m evaluation.sample RUN/exports/000064000000 --num 50000 --guidance 1.5 --out samples --shard 0/2
    torchrun --nproc_per_node 8 -m evaluation.sample -- RUN/exports/000064000000 --num 50000 --out samples.npz
    python -m evaluation.sample BASE_64PX UPSAMPLER_256PX --respacing 250 --respacing 100 --out samples.npz
    python -m evaluation.sample UPSAMPLER_256PX --base samples64.npz --out samples256.npz
    python -m evaluation.sample BASE_32PX TO_64PX TO_256PX --low-res-noise 300 --low-res-noise 200 \\
        --augmentation truncated --out samples256.npz
    python -m evaluation.sample EXPORT --classifier CLASSIFIER --classifier-scale 4 --classes 5 --out dogs.npz

Each export after the first enlarges what the one before it made, with noise on it where it was trained so
(trainer/cascade.py). An npz holds `arr_0`, uint8 [N, H, W, 3], and for class-conditional networks `arr_1`, the classes
[N]: the layout in which published samples come. Any other --out is a folder of shards, a data split like those of
training. With them come a grid (.png) and an account of what was made (.json). Image i is a function of --seed, i, its
class and its row of --base: its noise bit for bit, its pixels up to the rounding that --batch brings. Any number of
processes make the same bits, and a command that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import sha256_file, write_json
from data_pipeline.progress import say
from data_pipeline.workspace import workspace
from evaluation.chunks import Arrays, Chunks, FinishedElsewhere, shard_of
from evaluation.device import pick_device
from evaluation.sample_files import Images, read_samples, write_npz, write_split
from evaluation.sample_place import Place
from evaluation.sample_request import Request
from evaluation.sampling_job import sample_chunks
from evaluation.sampling_options import add_sampling_options
from evaluation.stage_options import add_stage_options, samplings_of
from trainer.cascade import check_augmentation, check_cascade
from trainer.export import open_export
from trainer.grid import save_grid
from trainer.guiding import check_guide, guiding_classes
from trainer.sampling import Stage, check_guidance

GRID_IMAGES = 64
MAX_IMAGES = 100_000_000  # their list of chunks and of classes still fits in memory


def _request(a: argparse.Namespace) -> Request:
    """Raises UserError for what does not fit together, before any network is loaded."""
    exports = [open_export(path) for path in a.exports]
    for export in exports:
        export.check_holds(a.weights)
    configs = [export.config for export in exports]
    base, base_labels = (None, None) if a.base is None else read_samples(a.base)
    numbers = _rows(a, 0 if base is None else len(base))
    rows = slice(numbers.start, numbers.stop)
    samplings = samplings_of(a, exports)
    # Whether some stage hears classes, or a classifier that guides it: without guidance's zero, all that know any do.
    num_classes = max(
        (config.model.num_classes if sampling.guidance else 0) or guiding_classes(sampling)
        for config, sampling in zip(configs, samplings, strict=True)
    )
    labels = None
    if a.classes is not None:
        if not num_classes and any(config.model.num_classes for config in configs):
            raise UserError(f"--classes {a.classes}: --guidance 0 samples without classes; leave one of the two out.")
        if not num_classes:
            raise UserError(f"--classes {a.classes}: these networks know no classes; leave it out.")
        labels = _labels(a.classes, numbers)
    elif num_classes:
        labels = [number % num_classes for number in numbers] if base_labels is None else base_labels[rows]
    check_cascade(configs, base_size=0 if base is None else base.shape[-1], labels=labels)
    check_augmentation(configs, samplings, has_base=base is not None)
    for config, sampling in zip(configs, samplings, strict=True):
        check_guidance(config, sampling.guidance, labels)
        check_guide(config, sampling, labels)
    base = None if base is None else base[rows]
    return Request(exports, samplings, a.weights, numbers, labels, num_classes, base, a.base, a.seed, a.batch)


def _labels(text: str, numbers: Sequence[int]) -> list[int]:
    """`--classes 1,2,3`, repeated as needed: image i's class depends on i alone, whatever --first is."""
    words = text.split(",")
    try:
        chosen = [int(word) for word in words]
    except ValueError:
        raise UserError(f"--classes {text}: numbers such as 207 or 1,2,3 are expected (-1: no class).") from None
    return [chosen[number % len(chosen)] for number in numbers]


def _rows(a: argparse.Namespace, num_base: int) -> range:
    """The numbers of the images to make; with --base (of `num_base` images) they are rows of it."""
    num = a.num or (num_base - a.first if a.base else 16)
    last = a.first + max(num, 1) - 1
    if a.base and last >= num_base:
        raise UserError(
            f"--base {a.base} has images 0 to {num_base - 1}; image {last} was asked for: lower --first or --num."
        )
    return range(a.first, last + 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make images with trained networks, in one stage or several.")
    parser.add_argument("exports", type=Path, nargs="+", help="RUN/exports/<images seen>, smallest images first")
    parser.add_argument("--out", type=Path, required=True, help="samples.npz, or a folder for shards")
    parser.add_argument("--overwrite", action="store_true", help="replace other samples at --out")
    parser.add_argument("--num", type=int, help="how many images (default: 16, or all of --base from --first on)")
    parser.add_argument("--first", type=int, default=0, help="number of the first image, and its row of --base")
    parser.add_argument("--base", type=Path, help="npz of small images that the first export is to enlarge")
    parser.add_argument(
        "--classes", help="such as 207 or 1,2,3, in turn (default: those of --base, or image i has class i modulo all)"
    )
    add_sampling_options(parser, sampler="ancestral")
    add_stage_options(parser)
    parser.add_argument("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument("--shard", help="the part of this process: 0/2 and 1/2 (default: as a launcher says)")
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    return parser.parse_args()


def _check_numbers(a: argparse.Namespace) -> None:
    for name, least, most in (
        ("num", 1, MAX_IMAGES), ("first", 0, MAX_IMAGES - 1), ("batch", 1, 2**63 - 1), ("seed", 0, 2**63 - 1),
        ("num_threads", 1, 2**63 - 1),
    ):  # fmt: skip
        value = getattr(a, name)
        option = f"--{name.replace('_', '-')} {value}"
        if value is not None and value < least:
            raise UserError(f"{option} is too small; use {least} or more.")
        if value is not None and value > most:
            raise UserError(f"{option} is too large; use {most} or less.")
    if a.first + (a.num or 1) > MAX_IMAGES:
        raise UserError(
            f"--first {a.first} and --num {a.num}: images have the numbers 0 to {MAX_IMAGES - 1}; lower one of the two."
        )


def main() -> int:
    """The command line."""
    a = _parse()
    _check_numbers(a)
    shard, place = shard_of(a.shard), Place(a.out)
    place.check()
    request = _request(a)
    options = request.options()
    key = request.key(options)
    if place.holds(key):
        place.remove_chunks()
        print(f"{place.out} already holds these images, complete: nothing to do.")
        return 0
    place.make_room(key, overwrite=a.overwrite)
    work = place.chunks / key
    work.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    device = pick_device(a.num_threads)
    stages = [
        Stage.open(export.network(request.weights).to(device), export.config, sampling, device)
        for export, sampling in zip(request.exports, request.samplings, strict=True)
    ]
    # An account that is there tells of what part 0 will replace, not that this job is done.
    chunks = Chunks(work, shard=shard, result=None if place.account.exists() else place.account)
    parts = sample_chunks(
        stages, request.numbers, base=request.base, labels=request.labels, seed=request.seed, batch=request.batch,
        device=device, chunks=chunks, title="samples", final=True,
    )  # fmt: skip
    try:
        _write(place, request, parts, options, key)
    except FinishedElsewhere:
        if place.holds(key):
            place.remove_chunks()
        say(f"part {shard.index} of {shard.count} is made; part 0 writes {place.out} when all are.")
        return 0
    place.remove_chunks()
    size = request.image_size
    print(f"{len(request.numbers)} images of {size}x{size} px: {place.out}, {place.files[1]}")
    for number, step in enumerate(request.reached_steps(), start=1):
        if step is not None:
            asked = request.samplings[number - 1].low_res_noise
            print(f"stage {number} was given images as noisy as step {step}, the first from {asked} on that is visited")
    return 0


def _write(place: Place, request: Request, parts: Iterator[Arrays], options: dict[str, Any], key: str) -> None:
    """The images as they come; then the grid and, last, the account."""
    first: list[Images] = []
    watched, account = _watched(parts, first), request.account(options, key)
    images = chain([next(watched)], watched)  # with the first one, all of this process are made: now put them together
    if not place.is_folder:
        made = place.chunks / key / place.out.name
        write_npz(
            made, images, num=len(request.numbers), image_size=request.image_size, labels=request.labels,
            scratch=made.parent,
        )  # fmt: skip
        place.replace_images(made)
        _write_grid(first, place.files[1])
        write_json(place.account, account | {"sha256": sha256_file(place.out)})
        return
    with workspace(place.out) as building:
        result = Place(building.result)
        manifest = write_split(
            building.result, images, numbers=request.numbers, image_size=request.image_size, labels=request.labels,
            num_classes=request.num_classes, name=request.exports[-1].config.name, source=request.source(options),
        )  # fmt: skip
        _write_grid(first, result.files[1])
        write_json(result.account, account | {"fingerprint": manifest.fingerprint})
        if place.out.exists():
            # Samples, which may be replaced (`make_room` has seen to that); removed with the workspace.
            place.out.rename(building.scratch / "replaced")
        building.publish()


def _watched(parts: Iterator[Arrays], first: list[Images]) -> Iterator[Images]:
    """The parts' images; those that the grid will show are noted in `first`."""
    for part in parts:
        images = part["images"]
        if (missing := GRID_IMAGES - sum(map(len, first))) > 0:
            first.append(images[:missing])
        yield images


def _write_grid(images: Sequence[Images], path: Path) -> None:
    save_grid(torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), path)


if __name__ == "__main__":
    run_cli(main)
