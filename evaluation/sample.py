"""Make images with trained networks, in one stage or several.

    python -m evaluation.sample RUN/exports/000064000000 --num 64 --respacing 250 --out samples.npz
    python -m evaluation.sample BASE_64PX UPSAMPLER_256PX --respacing 250 --respacing 100 --out samples.npz
    python -m evaluation.sample UPSAMPLER_256PX --base samples64.npz --out samples256.npz

Each export after the first enlarges what the one before it made. The npz holds `arr_0`, uint8 [N, H, W, 3], and for
class-conditional networks `arr_1`, the classes [N]: the layout in which published samples come. Beside it lie a grid
(.png) and what exactly was made (.json). Image i is a function of --seed, i and its class alone.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.progress import progress_bar
from trainer.config import SamplingConfig, validate
from trainer.export import Export, Weights, open_export
from trainer.grid import save_grid
from trainer.sampling import Stage, check_cascade, sample_cascade

GRID_IMAGES = 64


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
    made = []
    calls = len(numbers) * sum(stage.num_calls for stage in stages)
    with progress_bar(total=calls, unit="call", description="samples", disable=not progress) as bar:
        for start in range(0, len(numbers), batch):
            part = slice(start, start + batch)
            own = numbers[part]
            images = sample_cascade(
                stages, own, seed=seed, device=device, progress=partial(bar.update, len(own)),
                base=None if base is None else base[part], labels=None if labels is None else labels[part],
            )  # fmt: skip
            made.append(images[-1])
    return torch.cat(made)


def read_samples(path: Path) -> tuple[Tensor, list[int] | None]:
    """Images uint8 [N, 3, H, W] and classes [N], if any, from an npz of samples. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
            labels = file["arr_1"] if "arr_1" in file.files else None
    except FileNotFoundError:
        raise UserError(f"--base {path}: no such file.") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--base {path} is not an npz of samples (arr_0, uint8 [N, H, W, 3]): {error}.") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(
            f"--base {path}: arr_0 is {images.dtype} {list(images.shape)}; samples are uint8 [N, size, size, 3]."
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(f"--base {path}: {len(images)} images in arr_0 but classes {list(labels.shape)} in arr_1.")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), None if labels is None else labels.tolist()


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


def _stages(exports: Sequence[Export], a: argparse.Namespace, device: torch.device) -> list[Stage]:
    respacings = a.respacing or ["50"]
    if len(respacings) not in (1, len(exports)):
        raise UserError(f"--respacing was given {len(respacings)} times for {len(exports)} stages; once, or for each.")
    stages = []
    for export, respacing in zip(exports, respacings * (len(exports) // len(respacings)), strict=True):
        how = {"sampler": a.sampler, "respacing": respacing, "eta": a.eta}
        sampling = validate(SamplingConfig, how, source="arguments")
        stages.append(Stage(export.network(a.weights).to(device), export.config, sampling))
    return stages


def _labels(text: str | None, num: int) -> list[int] | None:
    """`--classes 1,2,3` for `num` images, repeated as needed."""
    if text is None:
        return None
    words = text.split(",")
    try:
        chosen = [int(word) for word in words]
    except ValueError:
        raise UserError(f"--classes {text}: numbers such as 207 or 1,2,3 are expected (-1: no class).") from None
    return [chosen[i % len(chosen)] for i in range(num)]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make images with trained networks, in one stage or several.")
    parser.add_argument("exports", type=Path, nargs="+", help="RUN/exports/<images seen>, smallest images first")
    parser.add_argument("--out", type=Path, required=True, help="samples.npz")
    parser.add_argument("--num", type=int, help="how many images (default: 16, or as many as --base has)")
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--base", type=Path, help="npz of small images that the first export is to enlarge")
    parser.add_argument("--classes", help="such as 207 or 1,2,3 (default: image i has class i modulo their number)")
    parser.add_argument("--sampler", choices=("ancestral", "ddim"), default="ancestral")
    parser.add_argument(
        "--respacing", action="append", help="steps: 50, 10,15,20, ddim50, quadratic50; once, or for each export"
    )
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    a = parser.parse_args()
    for name, least in (("num", 1), ("first", 0), ("batch", 1), ("seed", 0)):
        value = getattr(a, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small; use {least} or more.")
    if a.out.suffix != ".npz":
        raise UserError(f"--out {a.out} must end in .npz.")
    if a.num_threads:
        torch.set_num_threads(a.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exports = [open_export(path) for path in a.exports]
    base, labels = (None, None) if a.base is None else read_samples(a.base)
    check_cascade([export.config for export in exports], base_size=0 if base is None else base.shape[-1])
    num = a.num or (16 if base is None else len(base))
    if base is not None and num > len(base):
        raise UserError(f"--num {num}: {a.base} has {len(base)} images; ask for no more.")
    numbers = range(a.first, a.first + num)
    num_classes = max(export.config.model.num_classes for export in exports)
    labels = _labels(a.classes, num) or (labels and labels[:num])
    if num_classes and labels is None:
        labels = [number % num_classes for number in numbers]
    a.out.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    images = make_samples(
        _stages(exports, a, device), numbers,
        base=None if base is None else base[:num], labels=labels, seed=a.seed, batch=a.batch, device=device,
    )  # fmt: skip
    write_samples(a.out, images, labels if num_classes else None)
    save_grid(images[:GRID_IMAGES], a.out.with_suffix(".png"))
    write_json(a.out.with_suffix(".json"), _account(exports, a, num))
    print(f"{num} images of {images.shape[-1]}x{images.shape[-1]} px: {a.out}, {a.out.with_suffix('.png')}")
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
