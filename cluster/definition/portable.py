"""A study as files that need nothing else: its own YAML and those of its run configs, merged with all their bases."""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.definition.spec import StudyConfig
from data_pipeline.files import write_atomic
from trainer.config.tree import read_tree, save_config


def save_portable(study: StudyConfig, folder: Path, name: str = "study") -> Path:
    """Write `name`.yaml with its run configs beside it; returns its path. It can be read wherever the folder is seen.

    The YAML is written last: who finds it finds all it names.
    """
    files: dict[Path, str] = {}
    for run in (study.run, *(trial.run for trial in study.extra)):
        if run not in files:
            files[run] = f"{name}.run{len(files) or ''}.yaml"
    texts = {file: yaml.safe_dump(read_tree(run), sort_keys=False) for run, file in files.items()}
    for file, text in texts.items():
        write_atomic(folder / file, text)
    extra = tuple(trial.model_copy(update={"run": Path(files[trial.run])}) for trial in study.extra)
    path = folder / f"{name}.yaml"
    save_config(study.model_copy(update={"run": Path(files[study.run]), "extra": extra}), path)
    return path


def remove_portable(path: Path) -> None:
    """Remove what `save_portable` wrote, the YAML first."""
    path.unlink(missing_ok=True)
    for run in path.parent.glob(f"{path.stem}.run*.yaml"):
        run.unlink(missing_ok=True)
