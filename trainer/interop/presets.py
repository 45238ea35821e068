"""Run configs by short name: `imagenet64/hybrid` is configs/runs/imagenet64/hybrid.yaml."""

from __future__ import annotations

import difflib
from pathlib import Path

from data_pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2] / "configs" / "runs"


def preset_names() -> list[str]:
    """All names, in order."""
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))


def find_preset(name: str) -> Path:
    """The YAML file of a preset; `name` may also be a YAML file. Raises ConfigError listing the close names."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)  # whether it is there, its reader says
    names = preset_names()
    if name in names:
        return ROOT / f"{name}.yaml"
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}."
    raise ConfigError(f"--preset {name}: there is no such preset in configs/runs; {hint}")
