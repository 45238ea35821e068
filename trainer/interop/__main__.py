"""Bring weights of other code bases in, and take ours out:

    python -m trainer.interop import ema_0.9999_1500000.pt --preset imagenet64/hybrid --out imported/imagenet64
    python -m trainer.interop import 64x64_diffusion.pt --preset imagenet64/adm --format guided-diffusion --out adm
    python -m trainer.interop export RUN/exports/000192000000 --out ema_0.9999_1500000.pt

The config of an import is a preset (a file below configs/runs, by its name) with section.key=value changes. The number
of heads, the image size and the diffusion process leave no trace in a file of weights: the preset must have them right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import ConfigError, run_cli
from trainer.config.run import load_config
from trainer.interop import FORMATS
from trainer.interop.convert import export_checkpoint, import_checkpoint
from trainer.interop.presets import find_preset


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ConfigError for what it does not know."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="a checkpoint of another code base to an export of ours")
    bring.add_argument("checkpoint", type=Path, help="file of weights, such as ema_0.9999_500000.pt")
    bring.add_argument("--preset", required=True, help="a name below configs/runs (imagenet64/hybrid), or a YAML file")
    bring.add_argument("--out", type=Path, required=True, help="folder of the export; it must be new or empty")
    bring.add_argument("--model", type=Path, help="the bare weights, where the first file holds the averaged ones")
    bring.add_argument("--images", type=int, help="images seen in training (default: by the file's name)")
    bring.set_defaults(overrides=[])
    take = commands.add_parser("export", help="an export of ours to a checkpoint of another code base")
    take.add_argument("export", type=Path, help="RUN/exports/<images seen>, or an imported one")
    take.add_argument("--out", type=Path, required=True, help="the new file, such as ema_0.9999_500000.pt")
    take.add_argument("--weights", default="ema", help="ema, model (the bare ones), or a further average it holds")
    for command in (bring, take):
        command.add_argument("--format", choices=tuple(FORMATS), default="improved-diffusion", help="the code base")
    parsed, rest = parser.parse_known_args(arguments)  # overrides may stand anywhere, which positionals may not
    unknown = [word for word in rest if parsed.command == "export" or word.startswith("-") or "=" not in word]
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; settings of an import are given as section.key=value.")
    parsed.overrides = rest
    return parsed


def main() -> int:
    """Import or export; prints what was made and what to do with it."""
    a = parse_arguments()
    if a.command == "import":
        if a.images is not None and a.images < 1:
            raise ConfigError(f"--images {a.images} is too small; give the images seen in training, 1 or more.")
        config = load_config(find_preset(a.preset), a.overrides)
        info = import_checkpoint(a.checkpoint, a.out, config, model=a.model, images=a.images, format_name=a.format)
        kinds = info["source"]["files"]
        what = f"{' and '.join(kinds)} weights, {info['num_params']:,} parameters, {info['nimg']:,} images seen"
        print(f"{a.out}: {config.name}, {what}")
        weights = "" if "ema" in kinds else " --weights model"
        advice = f"evaluate it: python -m evaluation.evaluate {a.out} --data SPLIT{weights}"
        if config.model.low_res_size:  # makes images from those of a base network only
            advice = f"sample it: python -m evaluation.sample BASE {a.out} --out samples.npz{weights}"
        if config.is_classifier:
            weights = weights.replace("--weights", "--classifier-weights")
            advice = (
                f"guide with it: python -m evaluation.sample NETWORK --classifier {a.out} --out samples.npz{weights}"
            )
        print(advice, file=sys.stderr)
    else:
        flags = export_checkpoint(a.export, a.out, weights=a.weights, format_name=a.format)
        print(f"{a.out}: the {a.weights} weights of {a.export}", file=sys.stderr)
        print("\n".join(flags))
    return 0


if __name__ == "__main__":
    run_cli(main)
