"""A study whose samples a classifier guides; and classifiers that a study cannot evaluate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from coloured_data import CLASSIFIER
from random_stage import make_export, make_stage

from cluster.definition.portable import save_portable
from cluster.definition.spec import load_study
from cluster.definition.trials import make_trials
from cluster.planning.costs import evaluation_flops
from data_pipeline.errors import ConfigError
from trainer.export import open_export
from trainer.models import count


@pytest.fixture(scope="module")
def classifier(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("exports") / "classifier", make_stage(tiny_config, *CLASSIFIER))


STUDY = """
name: guided
run: {run}
ladder: {{key: model.channels, values: [6]}}
budget: {{images: 48}}
evaluation:
  test: {test}
  nll: null
  distance: {{num_samples: 4, respacing: 5, classifier: {classifier}, classifier_scale: 2}}
"""


def test_a_study_names_one_beside_it(classifier: Path, tiny_config: Path, generated_data: Path, tmp_path: Path) -> None:
    """Relative to the study's file; a copy of the study elsewhere means the same export, which is not copied."""
    folder = tmp_path / "studies"
    folder.mkdir()
    shutil.copytree(classifier, folder / "classifier")
    text = STUDY.format(run=tiny_config, test=generated_data / "test", classifier="classifier")
    (folder / "study.yaml").write_text(text)
    study = load_study(folder / "study.yaml")
    assert study.evaluation.distance is not None
    assert study.evaluation.distance.sampling.classifier == folder / "classifier"
    copied = load_study(save_portable(study, tmp_path / "elsewhere"))
    assert copied.evaluation == study.evaluation
    (trial,) = make_trials(study)
    own = open_export(folder / "classifier").config
    each = trial.cost.forward_flops + 2 * count(own.model, own.diffusion).forward_flops
    assert evaluation_flops(study, trial, last=True) == [pytest.approx(4 * 5 * each)]


def test_a_study_does_not_evaluate_classifiers(tiny_config: Path, generated_data: Path, tmp_path: Path) -> None:
    (tmp_path / "classifier.yaml").write_text(
        f"base: {tiny_config}\nmodel: {{name: classifier, channels: 6, channel_mult: [1, 2], num_res_blocks: 1, "
        "attention_resolutions: [], num_heads: 2, num_classes: 4}\ndiffusion: {objective: cross_entropy}\n"
    )
    (tmp_path / "study.yaml").write_text(
        "name: c\nrun: classifier.yaml\nladder: {key: model.channels, values: [6]}\nbudget: {images: 48}\n"
        f"evaluation: {{test: {generated_data / 'test'}}}\n"
    )
    with pytest.raises(ConfigError, match=r"model\.name=classifier has no likelihood"):
        make_trials(load_study(tmp_path / "study.yaml"))
