"""Make images with trained networks, in one stage or several.

    python -m evaluation.sample RUN/exports/000064000000 --num 64 --respacing 250 --out samples.npz
    python -m evaluation.sample BASE_64PX UPSAMPLER_256PX --respacing 250 --respacing 100 --out samples.npz
    python -m evaluation.sample UPSAMPLER_256PX --base samples64.npz --out samples256.npz

Each export after the first enlarges what the one before it made. The npz holds `arr_0`, uint8 [N, H, W, 3], and for
class-conditional networks `arr_1`, the classes [N]: the layout in which published samples come. Beside it lie a grid
(.png) and an account of what was made (.json). Image i is a function of --seed, i, its class and its row of --base: its
noise bit for bit, its pixels up to the rounding that the batch size brings.
"""

from __future__ import annotations

import argparse
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.progress import progress_bar
from trainer.config import SamplingConfig, validate
from trainer.diffusion.respacing import space_timesteps
from trainer.export import Export, Weights, open_export
from trainer.grid import save_grid
from trainer.models import IMAGE_CHANNELS
from trainer.sampling import Stage, check_cascade, sample_cascade

GRID_IMAGES = 64
WRITTEN = (".npz", ".png", ".json")


def make_samples(
    stages: Sequence[Stage],
    numbers: Sequence[int],
    *,
    base: Tensor | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    batch: int = 16,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """The last stage's images number `numbers`: uint8 [N, C, H, W], made `batch` at a time.

    `base` [N, C, h, w] uint8 and `labels` [N] belong to the numbers, as in `sample_cascade`.
    """
    size = stages[-1].config.model.image_size
    made = torch.empty(len(numbers), IMAGE_CHANNELS, size, size, dtype=torch.uint8)
    calls = len(numbers) * sum(stage.num_calls for stage in stages)
    with progress_bar(total=calls, unit="call", description="samples", disable=not progress) as bar:
        for start in range(0, len(numbers), batch):
            part = slice(start, start + batch)
            own = numbers[part]
            images = sample_cascade(
                stages, own, seed=seed, device=device, progress=partial(bar.update, len(own)),
                base=None if base is None else base[part], labels=None if labels is None else labels[part],
            )  # fmt: skip
            made[part] = images[-1]
    return made


def read_samples(path: Path) -> tuple[Tensor, list[int] | None]:
    """Images uint8 [N, 3, H, W] and classes [N], if any, from an npz of samples. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
            labels = file["arr_1"] if "arr_1" in file.files else None
    except FileNotFoundError:
        raise UserError(f"--base {path}: no such file.") from None
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--base {path} is not an npz of samples (arr_0, uint8 [N, H, W, 3]): {error}.") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(
            f"--base {path}: arr_0 is {images.dtype} {list(images.shape)}; samples are uint8 [N, size, size, 3]."
        )
    if images.size == 0:
        raise UserError(f"--base {path} holds no images: arr_0 is {list(images.shape)}.")
    if labels is not None:
        _check_classes(path, labels, num=len(images))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), None if labels is None else labels.tolist()


def _check_classes(path: Path, labels: NDArray[Any], *, num: int) -> None:
    if labels.shape != (num,):
        raise UserError(f"--base {path}: {num} images in arr_0 but classes {list(labels.shape)} in arr_1.")
    if labels.dtype.kind not in "iu" or labels.min() < -1:
        raise UserError(
            f"--base {path}: arr_1 ({labels.dtype}) must hold classes, whole numbers from 0 (-1: no class); without "
            "arr_1, image i has class i modulo their number."
        )


def write_samples(path: Path, images: Tensor, labels: Sequence[int] | None) -> None:
    """Write uint8 [N, C, H, W] and classes as an npz, completely or not at all."""
    arrays = [images.permute(0, 2, 3, 1).numpy()]
    if labels is not None:
        arrays.append(np.array(labels, dtype=np.int64))
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    try:
        np.savez(temporary, *arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _samplings(exports: Sequence[Export], a: argparse.Namespace) -> list[SamplingConfig]:
    """How each export is sampled. Raises UserError for steps that its process has not."""
    respacings = a.respacing or ["50"]
    if len(respacings) not in (1, len(exports)):
        raise UserError(f"--respacing was given {len(respacings)} times for {len(exports)} stages; once, or for each.")
    samplings = []
    for export, respacing in zip(exports, respacings * (len(exports) // len(respacings)), strict=True):
        how = {"sampler": a.sampler, "respacing": respacing, "eta": a.eta}
        samplings.append(validate(SamplingConfig, how, source="arguments"))
        space_timesteps(export.config.diffusion.num_timesteps, samplings[-1].respacing)
    return samplings


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
    parser.add_argument("--out", type=Path, required=True, help="samples.npz")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there at --out")
    parser.add_argument("--num", type=int, help="how many images (default: 16, or all of --base from --first on)")
    parser.add_argument("--first", type=int, default=0, help="number of the first image, and its row of --base")
    parser.add_argument("--base", type=Path, help="npz of small images that the first export is to enlarge")
    parser.add_argument(
        "--classes", help="such as 207 or 1,2,3, in turn (default: those of --base, or image i has class i modulo all)"
    )
    parser.add_argument("--sampler", choices=("ancestral", "ddim"), default="ancestral")
    parser.add_argument(
        "--respacing", action="append", help="steps: 50, 10,15,20, ddim50, quadratic50; once, or for each export"
    )
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim")
    parser.add_argument("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    return parser.parse_args()


def _check_numbers(a: argparse.Namespace) -> None:
    for name, least in (("num", 1), ("first", 0), ("batch", 1), ("seed", 0), ("num_threads", 1)):
        value = getattr(a, name)
        option = f"--{name.replace('_', '-')} {value}"
        if value is not None and value < least:
            raise UserError(f"{option} is too small; use {least} or more.")
        if value is not None and value >= 2**63:
            raise UserError(f"{option} is too large; use less than 2**63.")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where the results could not be written, or would replace others unasked."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} must end in .npz.")
    for path in map(out.with_suffix, WRITTEN):
        if path.is_dir():
            raise UserError(f"--out {out}: {path} is a folder; name a file that is to be made.")
        if path.exists() and not overwrite:
            raise UserError(f"--out {out}: {path} exists; give another name, or --overwrite to replace it.")
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"--out {out}: {above} is a file, not a folder.")


def main() -> int:
    """The command line."""
    a = _parse()
    _check_numbers(a)
    _check_out(a.out, a.overwrite)
    if a.num_threads:
        torch.set_num_threads(a.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exports = [open_export(path) for path in a.exports]
    configs = [export.config for export in exports]
    num_classes = max(config.model.num_classes for config in configs)
    base, labels = (None, None) if a.base is None else read_samples(a.base)
    numbers = _rows(a, 0 if base is None else len(base))
    rows = slice(numbers.start, numbers.stop)
    if a.classes is not None:
        if not num_classes:
            raise UserError(f"--classes {a.classes}: these networks know no classes; leave it out.")
        labels = _labels(a.classes, numbers)
    elif labels is not None:
        labels = labels[rows]
    elif num_classes:
        labels = [number % num_classes for number in numbers]
    check_cascade(configs, base_size=0 if base is None else base.shape[-1], labels=labels)
    samplings = _samplings(exports, a)
    stages = [
        Stage(export.network(a.weights).to(device), export.config, sampling)
        for export, sampling in zip(exports, samplings, strict=True)
    ]
    a.out.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    images = make_samples(
        stages, numbers, base=None if base is None else base[rows], labels=labels, seed=a.seed, batch=a.batch,
        device=device,
    )  # fmt: skip
    write_samples(a.out, images, labels if num_classes else None)
    save_grid(images[:GRID_IMAGES], a.out.with_suffix(".png"))
    write_json(a.out.with_suffix(".json"), _account(exports, a, len(numbers)))
    print(f"{len(numbers)} images of {images.shape[-1]}x{images.shape[-1]} px: {a.out}, {a.out.with_suffix('.png')}")
    return 0


def _account(exports: Sequence[Export], a: argparse.Namespace, num: int) -> dict[str, object]:
    """What was made, of what, and how."""
    weights: Weights = a.weights
    return {
        "first": a.first,
        "num": num,
        "seed": a.seed,
        "sampler": a.sampler,
        "eta": a.eta,
        "respacing": a.respacing or ["50"],
        "base": str(a.base) if a.base else None,
        "weights": weights,
        "exports": [
            {"path": str(e.path), "nimg": e.info["nimg"], "weights_sha256": e.weights_sha256[weights]} for e in exports
        ],
    }


if __name__ == "__main__":
    run_cli(main)
