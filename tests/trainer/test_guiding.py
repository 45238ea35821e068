"""Samples of networks that a classifier guides: where they go, what they cost, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coloured_data import CLASSIFIER
from random_stage import make_export, make_stage
from torch import Tensor

from data_pipeline.errors import ConfigError, UserError
from trainer.cascade import sample_cascade
from trainer.config.run import RunConfig, load_config
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.export import open_export
from trainer.guiding import check_guide, guide_flops, samples_said
from trainer.models import count
from trainer.sampling import Stage, sample, sample_flops

CLASSES = ("model.num_classes=4", "model.null_class=true")


@pytest.fixture(scope="module")
def classifier(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a classifier with random weights, which is sure of what it says."""
    stage = make_stage(tiny_config, *CLASSIFIER)
    with torch.no_grad():
        stage.network.get_parameter("pool.proj.weight").mul_(200)
    return make_export(tmp_path_factory.mktemp("classifier") / "000000000008", stage)


def led(stage: Stage, classifier: Path, scale: float, **settings: Any) -> Stage:
    """The stage, guided."""
    both = {"classifier": classifier, "classifier_scale": scale, **settings}
    return Stage.open(stage.network, stage.config, stage.sampling.model_copy(update=both))


def log_p(classifier: Path, images: Tensor, labels: list[int]) -> float:
    """What the classifier says, in the mean, of these classes of finished images."""
    export = open_export(classifier)
    time = GaussianDiffusion.create(export.config.diffusion).network_time(torch.zeros(len(images), dtype=torch.long))
    says = export.network("ema")(images.float() / 127.5 - 1, time).log_softmax(dim=1)
    return float(says.gather(1, torch.tensor(labels)[:, None]).mean())


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("classes", [(), CLASSES])
def test_samples_become_what_the_classifier_is_asked_for(
    tiny_config: Path, classifier: Path, sampler: str, classes: tuple[str, ...]
) -> None:
    """Of a network without classes too: it is then the classifier's that are asked for."""
    stage = make_stage(tiny_config, *classes, respacing="20", sampler=sampler)
    labels = [number % 4 for number in range(8)]
    said = [log_p(classifier, sample(led(stage, classifier, scale), range(8)), labels) for scale in (0.0, 1.0, 3.0)]
    assert said[0] + 0.3 < said[1] < said[2]
    assert torch.equal(
        sample(led(stage, classifier, 3.0), range(8)), sample(led(stage, classifier, 3.0), range(8), labels=labels)
    )


def test_an_image_is_its_own_whoever_is_beside_it(tiny_config: Path, classifier: Path) -> None:
    stage = led(make_stage(tiny_config), classifier, 3.0)
    together = sample(stage, range(4)).int()
    alone = torch.cat([sample(stage, [number]) for number in range(4)]).int()
    assert int((together - alone).abs().max()) <= 1
    seen = torch.get_rng_state()
    sample(stage, range(2))
    assert torch.equal(seen, torch.get_rng_state())


def test_both_ways_to_guide_at_once(tiny_config: Path, classifier: Path) -> None:
    stage = make_stage(tiny_config, *CLASSES)
    found = [sample(led(stage, classifier, s, guidance=g), range(4)) for g, s in ((2.0, 0.0), (2.0, 3.0), (1.0, 3.0))]
    assert all((found[1] != other).float().mean() > 0.05 for other in (found[0], found[2]))
    # With guidance=0 the network hears of no class; the classifier still does.
    labels = [[0, 1, 2, 3], [3, 2, 1, 0]]
    without = [sample(led(stage, classifier, 3.0, guidance=0.0), range(4), labels=each) for each in labels]
    assert (without[0] != without[1]).float().mean() > 0.05


def test_calls_and_flops_are_counted(tiny_config: Path, classifier: Path) -> None:
    stage = make_stage(tiny_config, *CLASSES)
    network = count(stage.config.model, stage.config.diffusion).forward_flops
    own = open_export(classifier).config
    gradient = 2 * count(own.model, own.diffusion).forward_flops
    for guidance, expected in ((1.0, 1), (2.0, 2)):
        guided, calls = led(stage, classifier, 1.0, guidance=guidance), []
        sample(guided, range(2), progress=lambda calls=calls: calls.append(1))  # type: ignore[misc]
        assert guided.num_calls == len(calls) == 5 * (expected + 1)
        assert sample_flops(guided.config, guided.sampling) == pytest.approx(5 * (expected * network + gradient))
        assert sample_flops(stage.config, stage.sampling) == pytest.approx(5 * network)
    assert guide_flops(SamplingConfig()) == 0


def test_classes_that_are_no_use_are_refused(tiny_config: Path, classifier: Path) -> None:
    for classes in ((), CLASSES):
        stage = led(make_stage(tiny_config, *classes), classifier, 1.0)
        for label in (-1, 4):
            with pytest.raises(UserError, match=f"class {label} is unknown to "):
                sample(stage, range(2), labels=[1, label])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("diffusion.num_timesteps=200", "diffusion.num_timesteps=100, not 200"),
        ("diffusion.schedule=linear", "diffusion.schedule=cosine, not linear"),
        ("diffusion.schedule=sigmoid", "diffusion.schedule=cosine, not sigmoid"),
        ("diffusion.rescale_timesteps=false", "diffusion.rescale_timesteps=True, not False"),
        ("model.image_size=32", "model.image_size=16, not 32"),
        ("model.num_classes=7", "model.num_classes=4, not 7"),
    ],
)
def test_a_classifier_of_other_images_is_refused(
    tiny_config: Path, classifier: Path, override: str, said: str
) -> None:  # fmt: skip
    config = load_config(tiny_config, [override])
    with pytest.raises(UserError, match=f"cannot guide tiny: it was trained with {said}; train"):
        check_guide(config, SamplingConfig(classifier=classifier))


def test_a_sigmoid_is_of_a_shape(tiny_config: Path, tmp_path: Path) -> None:
    sigmoid, other = "diffusion.schedule=sigmoid", "diffusion.sigmoid_tau=0.5"
    path = make_export(tmp_path / "sigmoid", make_stage(tiny_config, *CLASSIFIER, sigmoid))
    check_guide(load_config(tiny_config, [sigmoid]), SamplingConfig(classifier=path))
    with pytest.raises(UserError, match=r"trained with diffusion\.sigmoid_tau=1\.0, not 0\.5; train"):
        check_guide(load_config(tiny_config, [sigmoid, other]), SamplingConfig(classifier=path))


def test_what_is_no_classifier_is_refused(tiny_config: Path, classifier: Path, tmp_path: Path) -> None:
    stage = make_stage(tiny_config)
    config, unet = stage.config, make_export(tmp_path / "unet", stage)
    for named, said in (
        ({"classifier": unet}, r"tiny \(model.name=unet\) is no classifier"),
        ({"classifier": tmp_path / "none"}, "is not an export"),
        ({"classifier": classifier, "classifier_weights": "ema_0.5"}, "holds only ema, model"),
    ):
        with pytest.raises(UserError, match=f"classifier={named['classifier']}: .*{said}"):
            check_guide(config, SamplingConfig(**named))
    opened = open_export(classifier)
    with pytest.raises(UserError, match=r"stage 1 \(noisy\) is a classifier, which makes no images"):
        sample_cascade([Stage(opened.network("ema"), opened.config, SamplingConfig())], range(2))
    for key in ("classifier_scale=2", "classifier_weights=model"):
        with pytest.raises(ConfigError, match=rf"sample_grid\.{key}(\.0)? is for a classifier, but none is set"):
            load_config(tiny_config, [f"train.sample_grid.{key}"])


def test_a_classifier_goes_by_what_it_is(tiny_config: Path, classifier: Path, tmp_path: Path) -> None:
    copied = make_export(tmp_path / "elsewhere" / "x", make_stage(tiny_config, *CLASSIFIER))
    again = make_export(tmp_path / "again", make_stage(tiny_config, *CLASSIFIER))
    first, second, other = (samples_said(SamplingConfig(classifier=path)) for path in (copied, again, classifier))
    assert first == second
    assert first["classifier_sha256"] == open_export(copied).weights_sha256["ema"]
    assert other != first
    before = {"sampler": "ddim", "respacing": "50", "eta": 0.0, "guidance": 1.0}
    assert samples_said(SamplingConfig()) == before  # what it always was: keys are made of it
    assert first == before | {name: first[name] for name in first if name.startswith("classifier")}


def test_old_configs_name_no_classifier(tiny_config: Path) -> None:
    tree = load_config(tiny_config).model_dump(mode="json")
    for key in ("classifier", "classifier_scale", "classifier_weights"):
        del tree["train"]["sample_grid"][key]
    assert RunConfig.model_validate(tree) == load_config(tiny_config)
