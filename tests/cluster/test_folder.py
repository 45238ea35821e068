"""A study's folder keeps what was measured under other settings from being taken for this study's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.definition.spec import load_study
from cluster.definition.trials import make_trials
from cluster.files.folder import StudyFolder
from data_pipeline.errors import ConfigError
from trainer.config.run import load_config
from trainer.run_folder import RunFolder

STUDY = """
name: changed
run: {run}
ladder: {{key: model.channels, values: [4, 8]}}
settings: {{model.num_heads: 2}}
budget: {{images: 64}}
evaluation: {{test: {test}, num_points: 1, min_images: 64}}
"""


def test_a_changed_setting_is_refused_even_where_all_is_finished(
    tmp_path: Path, tiny_config: Path, generated_data: Path
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(run=tiny_config, test=generated_data / "test"))

    def folder(*overrides: str) -> StudyFolder:
        study = load_study(path, overrides)
        return StudyFolder(tmp_path / "out", study, make_trials(study))

    first = folder()
    for job in first.prepare():
        RunFolder(job.folder).open(load_config(job.folder / "trial.yaml"), {})  # as the trainer does
    first.prepare()  # unchanged: fine
    folder("budget.images=128").prepare()  # longer: it goes on
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.001 -> 0\.5"):
        folder('settings={"train.lr": 0.5, "model.num_heads": 2}').prepare()
