"""Weights of guided-diffusion: names, shapes, function and flags of its UNets, upsamplers and classifiers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from openai_networks import Untold, random_state, their_function
from torch import Tensor

from data_pipeline.errors import ConfigError, UserError
from trainer.config.run import RunConfig, load_config
from trainer.config.tree import to_yaml
from trainer.export import Weights, export_info, open_export, save_export
from trainer.interop import guided_diffusion, improved_diffusion
from trainer.interop.__main__ import main
from trainer.interop.convert import export_checkpoint, import_checkpoint
from trainer.interop.format import FileName, meta_network
from trainer.interop.presets import find_preset
from trainer.models import build_model

FORMAT = "guided-diffusion"
# 32 channels, (1, 2) wide, 16x16 images, 1 residual block a level, attention at 8x8, heads of 16 channels.
SMALL = """
name: small
run: {folder: unset}
data: {train: unset}
model:
  image_size: 16
  channels: 32
  channel_mult: [1, 2]
  num_res_blocks: 1
  attention_resolutions: [8]
  num_head_channels: 16
  resblock_updown: true
diffusion: {num_timesteps: 1000, rescale_timesteps: false}
train: {global_batch: 256, lr: 1.0e-4, budget_images: 2560}
"""
CLASSIFIER = [
    "model.name=classifier", "model.channels=32", "model.channel_mult=[1,2]", "model.num_res_blocks=1",
    "model.attention_resolutions=[8]", "model.num_head_channels=16", "model.resblock_updown=true",
    "model.num_classes=1000", "diffusion.objective=cross_entropy",
]  # fmt: skip
RESIZING: dict[str, Any] = {"input_blocks.2.0": "down", "output_blocks.1.2": "up"}  # a block each, between two levels
KINDS: dict[str, tuple[list[str], Untold]] = {
    "unconditional": ([], Untold(head_width=16, resizing=RESIZING)),
    "new order": (
        ["model.attention_order=qkv_first", "model.num_classes=1000"],
        Untold(head_width=16, resizing=RESIZING, qkv_first=True),
    ),
    "four heads": (["model.num_head_channels=null"], Untold(heads=4, resizing=RESIZING)),
    "upsampler": (["model.low_res_size=4", "model.num_classes=1000"], Untold(head_width=16, resizing=RESIZING)),
    "single convolutions": (["model.resblock_updown=false"], Untold(head_width=16)),
    **{
        f"classifier, {pool}": ([*CLASSIFIER, f"model.pool={pool}"], Untold(head_width=16, resizing=RESIZING))
        for pool in ("attention", "adaptive", "spatial", "spatial_v2")
    },
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def preset(name: str, *overrides: str) -> RunConfig:
    return load_config(find_preset(name), overrides)


def their_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    return {pair.theirs: pair.shape for pair in guided_diffusion.pairs(meta_network(config))}


def their_state(config: RunConfig) -> dict[str, Tensor]:
    return random_state(their_shapes(config))


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


# Names and shapes


@pytest.mark.parametrize(
    ("name", "num_keys", "facts"),
    [
        # The numbers of keys, and the order of all of them, were compared with networks that its own code built.
        ("imagenet64/adm", 541, {
            "label_emb.weight": (1000, 768),
            "input_blocks.4.0.in_layers.2.weight": (192, 192, 3, 3),  # where the older networks have .op
            "input_blocks.4.0.emb_layers.1.weight": (2 * 192, 768),
            "input_blocks.5.1.qkv.weight": (3 * 384, 384, 1),
            "output_blocks.3.2.out_layers.3.weight": (768, 768, 3, 3),  # and here .conv
            "out.2.weight": (6, 192, 3, 3),
        }),
        ("imagenet512/adm", 645, {
            "time_embed.0.weight": (1024, 256),
            "input_blocks.0.0.weight": (128, 3, 3, 3),
            "input_blocks.4.0.skip_connection.weight": (256, 128, 1, 1),
            "output_blocks.20.0.in_layers.2.weight": (128, 256, 3, 3),
        }),
        ("imagenet256/adm_upsampler", 567, {"input_blocks.0.0.weight": (192, 6, 3, 3)}),
        ("imagenet64/classifier", None, {
            "out.0.weight": (512,),
            "out.2.positional_embedding": (512, 65),
            "out.2.qkv_proj.weight": (1536, 512, 1),
            "out.2.c_proj.weight": (1000, 512, 1),
            "out.2.c_proj.bias": (1000,),
            "input_blocks.5.0.in_layers.2.weight": (128, 128, 3, 3),
        }),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_published_networks(name: str, num_keys: int | None, facts: dict[str, tuple[int, ...]]) -> None:
    found = their_shapes(preset(name))
    assert num_keys in (None, len(found))
    assert {key: found.get(key) for key in facts} == facts


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("attention", {"0": (64,), "2.qkv_proj": (192, 64, 1), "2.c_proj": (1000, 64, 1)}),
        ("adaptive", {"0": (64,), "3": (1000, 64, 1, 1)}),
        ("spatial", {"0": (2048, 3 * 32 + 2 * 64), "2": (1000, 2048)}),
        ("spatial_v2", {"0": (2048, 3 * 32 + 2 * 64), "1": (2048,), "3": (1000, 2048)}),
    ],
)
def test_the_pools(small: Path, pool: str, expected: dict[str, tuple[int, ...]]) -> None:
    found = their_shapes(load_config(small, [*CLASSIFIER, f"model.pool={pool}"]))
    weights = {key: shape for key, shape in found.items() if key.startswith("out.") and key.endswith(".weight")}
    assert weights == {f"out.{key}.weight": shape for key, shape in expected.items()}


# The function that their weights stand for


@pytest.mark.parametrize("kind", KINDS)
def test_imported_weights_are_the_same_function(small: Path, tmp_path: Path, kind: str) -> None:
    overrides, untold = KINDS[kind]
    config = load_config(small, overrides)
    state = their_state(config)
    import_checkpoint(save(state, tmp_path / "model10.pt"), tmp_path / "out", config, format_name=FORMAT)
    network = open_export(tmp_path / "out").network("model")
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16, requires_grad=True), torch.tensor([3.0, 700.5])
    y = torch.tensor([7, 999]) if config.model.hears_classes else None
    low_res = torch.randn(2, 3, 4, 4) if config.model.low_res_size else None
    ours, theirs = network(x, t, y, low_res), their_function(state, x, t, untold, y=y, low_res=low_res)
    others = their_function(state, x, t, Untold(heads=8, resizing=untold.resizing), y=y, low_res=low_res)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, others, rtol=1e-3, atol=1e-3)  # the comparison sees how heads are split
    if config.is_classifier:  # and its gradient in the noisy image is what guides
        log_p = [F.log_softmax(logits, dim=-1)[[0, 1], [7, 999]].sum() for logits in (ours, theirs)]
        one, other = (torch.autograd.grad(value, x)[0] for value in log_p)
        assert (one - other).norm() < 1e-4 * other.norm()
        assert other.norm() > 0


# Round trips


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_every_bit(small: Path, tmp_path: Path, kind: str) -> None:
    config = load_config(small, KINDS[kind][0])
    state = their_state(config)
    info = import_checkpoint(
        save(state, tmp_path / "ema_0.9999_000010.pt"), tmp_path / "out", config, format_name=FORMAT
    )
    assert info["nimg"] == 10 * 256
    assert info["source"]["format"] == FORMAT
    ours = open_export(tmp_path / "out").tensors("ema")
    back = {p.theirs: ours[p.ours].reshape(p.shape) for p in guided_diffusion.pairs(meta_network(config))}
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def our_export(path: Path, config: RunConfig, kinds: tuple[Weights, ...] = ("ema", "model")) -> Path:
    network = build_model(config.model, config.diffusion)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    info = export_info(config, nimg=2560, compute=1.0, run_id="r", data="d")
    weights = {
        kind: (lambda name, seed=seed: torch.full(shapes[name], float(seed))) for seed, kind in enumerate(kinds, 1)
    }
    save_export(path, weights, shapes, config=to_yaml(config), info=info)
    return path


# What a file that does not fit is told


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        ("unconditional", ["model.resblock_updown=false"],
         "model.resblock_updown: the file's network has True, the config False."),
        ("unconditional", ["model.channel_mult=[1,1]"],
         "model.channel_mult: the file's network has (1, 2), the config (1, 1)."),
        ("unconditional", ["model.num_res_blocks=2"],
         "model.num_res_blocks: the file's network has 1, the config 2."),
        ("classifier, attention", ["model.pool=adaptive"],
         "model.pool: the file's network has attention, the config adaptive."),
        ("classifier, attention", ["model.num_classes=10"],
         "model.num_classes: the file's network has 1000, the config 10."),
        ("classifier, spatial", ["model.attention_resolutions=[16]"],
         "model.attention_resolutions (numbers of the blocks): the file's network has (3,), the config (1,)."),
        ("classifier, attention", ["model.image_size=32", "model.attention_resolutions=[16]"],
         "model.image_size (size of the pooled feature maps): the file's network has 8, the config 16."),
        ("classifier, adaptive", ["model.channel_mult=[1,3]"],
         "model.channel_mult and num_res_blocks (widths of the blocks): the file's network has (32, 32, 64), the "
         "config (32, 32, 96)."),
    ],
)  # fmt: skip
def test_hints_name_the_setting(small: Path, kind: str, override: list[str], said: str) -> None:
    overrides = KINDS[kind][0]
    file, config = their_shapes(load_config(small, overrides)), load_config(small, [*overrides, *override])
    hints = guided_diffusion.differing_settings(file, config)
    assert [f"{key}: the file's network has {theirs}, the config {ours}." for key, (theirs, ours) in hints.items()] == [
        said
    ]  # fmt: skip


def test_a_file_that_does_not_fit_is_told_why_and_what_would(small: Path, tmp_path: Path) -> None:
    shapes = their_shapes(preset("imagenet256/classifier"))
    path = save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, tmp_path / "model10.pt")
    with pytest.raises(UserError) as caught:
        import_checkpoint(path, tmp_path / "out", load_config(small), format_name=FORMAT)
    assert "model.name: the file's network has classifier, the config unet." in str(caught.value)
    assert str(caught.value).count("the file's network has") == 1
    assert "Presets that fit: imagenet256/classifier." in str(caught.value)
    assert not (tmp_path / "out").exists()


# Names of files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("64x64_diffusion.pt", FileName("ema", 540_000)),
        ("128x128_diffusion.pt", FileName("ema", 4_360_000)),
        ("256x256_diffusion.pt", FileName("ema", 1_980_000)),
        ("256x256_diffusion_uncond.pt", FileName("ema")),
        ("512x512_diffusion.pt", FileName("ema", 1_940_000)),
        ("64_256_upsampler.pt", FileName("ema", 500_000)),
        ("128_512_upsampler.pt", FileName("ema", 1_050_000)),
        ("64x64_classifier.pt", FileName("model", 400_000)),
        ("512x512_classifier.pt", FileName("model", 500_000)),
        ("lsun_bedroom.pt", FileName("ema", 500_000)),
        ("lsun_horse_nodropout.pt", FileName("ema")),
        ("ema_0.9999_500000.pt", FileName("ema", 500_000, ema_decay=0.9999)),
        ("model000500.pt", FileName("model", 500)),
        ("mine.pt", FileName()),
        ("lsun_church.pt", FileName()),
    ],
)
def test_names(name: str, expected: FileName) -> None:
    assert guided_diffusion.read_name(name) == expected


@pytest.mark.parametrize(
    "name", ["imagenet64/adm", "imagenet128/adm", "imagenet256/adm", "imagenet512/adm", "imagenet64/classifier",
             "imagenet256/adm_upsampler", "imagenet512/adm_upsampler", "imagenet256/classifier", "lsun256/adm_bedroom"],
)  # fmt: skip
def test_published_names_and_presets_agree_on_the_length_of_training(name: str) -> None:
    config = preset(name)
    size, low = config.model.image_size, config.model.low_res_size
    file = f"{size}x{size}_{'classifier' if config.is_classifier else 'diffusion'}.pt"
    file = f"{low}_{size}_upsampler.pt" if low else "lsun_bedroom.pt" if name.startswith("lsun") else file
    iterations = guided_diffusion.read_name(file).iterations
    assert iterations is not None
    assert iterations * config.train.global_batch == config.train.budget_images


# Flags


def words(line: str) -> set[str]:
    """`NAME="--a 1 --b 2"` as {"a 1", "b 2"}."""
    return set(line.split('"')[1].removeprefix("--").split(" --"))


@pytest.mark.parametrize(
    ("name", "published", "further"),
    [
        # As its README gives them, the choice of precision apart; `further`: what it leaves at its defaults.
        ("imagenet64/adm", "attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
         "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 "
         "--num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_scale_shift_norm True", []),
        ("imagenet128/adm", "attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 "
         "--learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 "
         "--resblock_updown True --use_scale_shift_norm True", ["dropout 0.0", "use_new_attention_order False"]),
        ("imagenet512/adm", "attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 "
         "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
         "--resblock_updown True --use_scale_shift_norm True", ["dropout 0.0", "use_new_attention_order False"]),
        ("imagenet512/adm_upsampler", "attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 "
         "--large_size 512 --small_size 128 --learn_sigma True --noise_schedule linear --num_channels 192 "
         "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True",
         ["dropout 0.0"]),
        ("imagenet128/classifier", "image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 "
         "--classifier_width 128 --classifier_pool attention --classifier_resblock_updown True "
         "--classifier_use_scale_shift_norm True", ["diffusion_steps 1000", "noise_schedule linear"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)  # fmt: skip
def test_published_flags(name: str, published: str, further: list[str]) -> None:
    model, diffusion = guided_diffusion.flags(preset(name))
    assert model.startswith("CLASSIFIER_FLAGS=" if "classifier" in name else "MODEL_FLAGS=")
    defaults = {"predict_xstart False", "rescale_timesteps False", "rescale_learned_sigmas False", "use_kl False"}
    assert (words(model) | words(diffusion)) - defaults == {*published.split(" --"), *further}


@pytest.mark.parametrize(
    ("kind", "overrides", "flag"),
    [
        ("new order", [], "--channel_mult 1,2 "),  # 16x16 images have no multipliers of their own there
        ("unconditional", ["model.image_size=64", "model.channel_mult=[1,2,3,4]"], '"--image_size 64 --num_channels'),
        ("unconditional", ["model.attention_resolutions=[]"], "--attention_resolutions 32 "),  # of no level
        ("unconditional", ["diffusion.mse_target=x0"], "# training only: no flag for diffusion.mse_target=x0"),
    ],
)
def test_settings_become_flags(small: Path, kind: str, overrides: list[str], flag: str) -> None:
    assert flag in "\n".join(guided_diffusion.flags(load_config(small, [*KINDS[kind][0], *overrides])))


PUBLISHED_CLASSIFIER = [
    *CLASSIFIER, "model.image_size=64", "model.channels=64", "model.channel_mult=[1,2,3,4]",
    "model.num_head_channels=64",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.variance=fixed_small", "diffusion.objective=simple"],
        ["diffusion.prediction=v"],
        ["model.channel_mult=[0.5,1]", "model.channels=64"],
        ["model.num_classes=10"],
        ["model.null_class=true", "model.num_classes=1000"],
        ["model.channels=48"],
        ["model.image_size=32", "model.low_res_size=8"],
        ["model.attention_order=qkv_first", "model.low_res_size=16", "model.image_size=64",
         "model.channel_mult=[1,2,3,4]"],
        ["model.rescale_residuals=true"],
        ["model.num_head_channels=null", *[o for o in PUBLISHED_CLASSIFIER if "head" not in o]],
        ["model.attention_order=qkv_first", *PUBLISHED_CLASSIFIER],
        ["model.image_size=32", *[o for o in PUBLISHED_CLASSIFIER if "image_size" not in o]],
    ],
    ids=lambda overrides: overrides[0],
)  # fmt: skip
def test_what_it_cannot_express_is_refused_by_key_and_value(small: Path, tmp_path: Path, overrides: list[str]) -> None:
    export = our_export(tmp_path / "export", load_config(small, overrides), kinds=("ema",))
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(export, tmp_path / "ema_0.9999_10.pt", format_name=FORMAT)
    assert f"{overrides[0].replace('[0.5,1]', '[0.5, 1]')}: " in str(caught.value)
    assert str(caught.value).count("\n") == 1  # this one reason and no other
    assert not (tmp_path / "ema_0.9999_10.pt").exists()


def test_a_classifiers_flags_note_what_its_training_would_do_otherwise(small: Path) -> None:
    plain, changed = (
        guided_diffusion.flags(load_config(small, [*PUBLISHED_CLASSIFIER, *more]))
        for more in ([], ["model.dropout=0.1", "diffusion.rescale_timesteps=true", "diffusion.num_timesteps=4000"])
    )
    assert not any(line.startswith("#") for line in plain)
    assert [line.split(",")[0] for line in changed if line.startswith("#")] == [
        "# training only: its classifiers have no dropout", "# training only: it shows its classifiers t as it is",
    ]  # fmt: skip


# What improved-diffusion has not


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.num_head_channels=null"], ["model.resblock_updown=true"]),
        (["model.resblock_updown=false"], ["model.num_head_channels=16"]),
        (["model.attention_order=qkv_first"],
         ["model.resblock_updown=true", "model.num_head_channels=16", "model.attention_order=qkv_first"]),
        (CLASSIFIER, ["model.name=classifier", "model.resblock_updown=true", "model.num_head_channels=16"]),
        (["model.resblock_updown=false", "model.num_head_channels=null", "model.rescale_residuals=true"],
         ["model.rescale_residuals=true"]),
        (["model.resblock_updown=false", "model.num_head_channels=null", "model.low_res_size=4",
          "model.low_res_noise.max_step=9"], ["model.low_res_noise"]),
    ],
)  # fmt: skip
def test_its_predecessor_has_no_such_networks(
    small: Path, tmp_path: Path, overrides: list[str], said: list[str]
) -> None:
    config = load_config(small, overrides)
    assert [reason.split(":")[0] for reason in sorted(improved_diffusion.refusals(config))] == sorted(said)
    path = save({}, tmp_path / "ema_0.9999_10.pt")
    for attempt in (
        lambda: import_checkpoint(path, tmp_path / "out", config),
        lambda: export_checkpoint(our_export(tmp_path / "export", config), tmp_path / "x.pt"),
    ):
        with pytest.raises(ConfigError, match="improved-diffusion has no such network") as caught:
            attempt()
        assert str(caught.value).count("\n") == len(said)
    assert not (tmp_path / "out").exists()


# The command line


def test_the_command_line_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_main(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["interop", *map(str, arguments), "--format", FORMAT])
        assert main() == 0

    small = tmp_path / "classifier.yaml"
    small.write_text(SMALL)
    config = load_config(small, PUBLISHED_CLASSIFIER)
    path = save(their_state(config), tmp_path / "64x64_classifier.pt")
    run_main("import", path, "--preset", small, "--out", tmp_path / "out", *PUBLISHED_CLASSIFIER)
    said = capsys.readouterr()
    assert f"model weights, {sum(t.numel() for t in their_state(config).values()):,}" in said.out
    assert f"--classifier {tmp_path / 'out'} --out samples.npz --classifier-weights model" in said.err
    run_main("export", tmp_path / "out", "--out", tmp_path / "back.pt", "--weights", "model")
    assert "CLASSIFIER_FLAGS=" in capsys.readouterr().out
    state, back = (torch.load(each, weights_only=True) for each in (path, tmp_path / "back.pt"))
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
