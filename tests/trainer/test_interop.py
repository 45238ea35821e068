"""Weights of improved-diffusion: names, shapes and function as published; nothing executed, nothing guessed."""

from __future__ import annotations

import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_networks import Untold, random_state, their_function
from torch import Tensor

from data_pipeline.errors import ConfigError, UserError, run_cli
from trainer.config.run import RunConfig, load_config
from trainer.config.tree import to_yaml
from trainer.export import Export, Weights, export_info, open_export, save_export
from trainer.interop import improved_diffusion
from trainer.interop.__main__ import main, parse_arguments
from trainer.interop.convert import export_checkpoint, import_checkpoint
from trainer.interop.format import FileName, meta_network
from trainer.interop.presets import find_preset
from trainer.interop.pt_files import read_pt, write_pt
from trainer.models import build_model

SMALL = """
name: small
run: {folder: unset}
data: {train: unset}
model: {image_size: 32, channels: 32, channel_mult: [1, 2, 2, 2], num_res_blocks: 1}
train: {global_batch: 128, lr: 1.0e-4, budget_images: 1280}
"""
KINDS = {
    "unconditional": [],
    "class-conditional": ["model.num_classes=1000", "diffusion.rescale_timesteps=false"],
    "upsampler": [
        "model.image_size=64", "model.channel_mult=[1,2,3,4]", "model.low_res_size=16", "model.num_classes=1000",
        "diffusion.schedule=linear", "diffusion.vlb_weight=unrescaled",
    ],
    "one head": ["model.num_heads=1", "model.use_scale_shift_norm=false", "model.attention_resolutions=[16]"],
    "fixed variance": ["diffusion.variance=fixed_small", "diffusion.objective=simple", "diffusion.prediction=x0"],
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


# Their checkpoints, spelled out by hand


def res_block(name: str, channels_in: int, channels_out: int, emb: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.in_layers.0.weight": (channels_in,),
        f"{name}.in_layers.0.bias": (channels_in,),
        f"{name}.in_layers.2.weight": (channels_out, channels_in, 3, 3),
        f"{name}.in_layers.2.bias": (channels_out,),
        f"{name}.emb_layers.1.weight": (2 * channels_out, emb),
        f"{name}.emb_layers.1.bias": (2 * channels_out,),
        f"{name}.out_layers.0.weight": (channels_out,),
        f"{name}.out_layers.0.bias": (channels_out,),
        f"{name}.out_layers.3.weight": (channels_out, channels_out, 3, 3),
        f"{name}.out_layers.3.bias": (channels_out,),
    }
    if channels_in != channels_out:
        shapes[f"{name}.skip_connection.weight"] = (channels_out, channels_in, 1, 1)
        shapes[f"{name}.skip_connection.bias"] = (channels_out,)
    return shapes


def attention(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.norm.weight": (channels,),
        f"{name}.norm.bias": (channels,),
        f"{name}.qkv.weight": (3 * channels, channels, 1),
        f"{name}.qkv.bias": (3 * channels,),
        f"{name}.proj_out.weight": (channels, channels, 1),
        f"{name}.proj_out.bias": (channels,),
    }


def conv(name: str, channels_in: int, channels_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels_out, channels_in, 3, 3), f"{name}.bias": (channels_out,)}


# The network of TWO_LEVELS: 32 channels, (1, 2) wide, 16x16 images, 1 residual block a level, attention at 8x8.
TWO_LEVELS = ["model.image_size=16", "model.channel_mult=[1,2]", "model.attention_resolutions=[8]"]
THEIR_SHAPES: dict[str, tuple[int, ...]] = {
    "time_embed.0.weight": (128, 32),
    "time_embed.0.bias": (128,),
    "time_embed.2.weight": (128, 128),
    "time_embed.2.bias": (128,),
    **conv("input_blocks.0.0", 3, 32),
    **res_block("input_blocks.1.0", 32, 32, 128),
    **conv("input_blocks.2.0.op", 32, 32),
    **res_block("input_blocks.3.0", 32, 64, 128),
    **attention("input_blocks.3.1", 64),
    **res_block("middle_block.0", 64, 64, 128),
    **attention("middle_block.1", 64),
    **res_block("middle_block.2", 64, 64, 128),
    **res_block("output_blocks.0.0", 64 + 64, 64, 128),
    **attention("output_blocks.0.1", 64),
    **res_block("output_blocks.1.0", 64 + 32, 64, 128),
    **attention("output_blocks.1.1", 64),
    **conv("output_blocks.1.2.conv", 64, 64),
    **res_block("output_blocks.2.0", 64 + 32, 32, 128),
    **res_block("output_blocks.3.0", 32 + 32, 32, 128),
    "out.0.weight": (32,),
    "out.0.bias": (32,),
    **conv("out.2", 32, 6),
}


def save(state: Any, path: Path, **kwargs: Any) -> Path:
    torch.save(state, path, **kwargs)
    return path


def test_the_cifar10_network_has_the_published_names() -> None:
    found = {pair.theirs: pair.shape for pair in improved_diffusion.pairs(meta_network(preset("cifar10/hybrid")))}
    assert len(found) == 446
    facts = {
        "input_blocks.1.0.in_layers.0.weight": (128,),
        "input_blocks.4.0.op.weight": (128, 128, 3, 3),
        "input_blocks.5.0.emb_layers.1.weight": (512, 512),
        "input_blocks.5.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.5.1.qkv.weight": (768, 256, 1),
        "middle_block.1.proj_out.weight": (256, 256, 1),
        "middle_block.2.out_layers.3.weight": (256, 256, 3, 3),
        "output_blocks.3.1.conv.weight": (256, 256, 3, 3),  # no attention at 4x4
        "output_blocks.11.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.12.0.in_layers.2.weight": (128, 384, 3, 3),
        "output_blocks.15.0.skip_connection.weight": (128, 256, 1, 1),
        "out.2.weight": (6, 128, 3, 3),
    }
    assert {key: found[key] for key in facts} == facts


def preset(name: str) -> RunConfig:
    return load_config(find_preset(name))


def test_names_and_shapes_of_a_small_network_are_theirs_in_their_order(small: Path) -> None:
    pairs = improved_diffusion.pairs(meta_network(load_config(small, TWO_LEVELS)))
    assert [(pair.theirs, pair.shape) for pair in pairs] == list(THEIR_SHAPES.items())


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("imagenet64/class_conditional", "label_emb.weight", (1000, 768)),
        ("imagenet256/upsampler", "input_blocks.0.0.weight", (192, 6, 3, 3)),
        ("lsun256/bedroom", "input_blocks.1.0.emb_layers.1.weight", (128, 512)),
        ("lsun256/bedroom", "input_blocks.13.1.qkv.weight", (3 * 512, 512, 1)),
    ],
)
def test_other_published_networks(name: str, key: str, shape: tuple[int, ...]) -> None:
    assert {p.theirs: p.shape for p in improved_diffusion.pairs(meta_network(preset(name)))}[key] == shape


# The function that their weights stand for


@pytest.mark.parametrize("kind", KINDS)
def test_imported_weights_are_the_same_function(small: Path, tmp_path: Path, kind: str) -> None:
    config = load_config(small, KINDS[kind])
    state = random_state({pair.theirs: pair.shape for pair in improved_diffusion.pairs(meta_network(config))})
    import_checkpoint(save(state, tmp_path / "ema_0.9999_10.pt"), tmp_path / "out", config)
    size, low = config.model.image_size, config.model.low_res_size
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, size, size), torch.tensor([3.0, 700.5])
    y = torch.tensor([7, 999]) if config.model.num_classes else None
    low_res = torch.randn(2, 3, low, low) if low else None
    with torch.no_grad():
        ours = open_export(tmp_path / "out").network("ema")(x, t, y, low_res)
        theirs = their_function(state, x, t, Untold(heads=config.model.num_heads), y=y, low_res=low_res)
        others = their_function(state, x, t, Untold(heads=8), y=y, low_res=low_res)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, others, rtol=1e-2, atol=1e-2)  # the comparison sees how heads are split


# Round trips


def our_export(path: Path, config: RunConfig, kinds: tuple[Weights, ...] = ("ema", "model")) -> Export:
    network = build_model(config.model, config.diffusion)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}

    def tensors(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    info = export_info(config, nimg=1280, compute=1.0, run_id="r", data="d")
    weights = {kind: tensors(i).__getitem__ for i, kind in enumerate(kinds)}
    save_export(path, weights, shapes, config=to_yaml(config), info=info)
    return open_export(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_every_bit(small: Path, tmp_path: Path, kind: str) -> None:
    config = load_config(small, KINDS[kind])
    before = our_export(tmp_path / "before", config)
    export_checkpoint(before.path, tmp_path / "ema_0.9999_000010.pt")
    export_checkpoint(before.path, tmp_path / "model000010.pt", weights="model")
    import_checkpoint(tmp_path / "ema_0.9999_000010.pt", tmp_path / "out", config, model=tmp_path / "model000010.pt")
    after = open_export(tmp_path / "out")
    assert after.weights_sha256 == before.weights_sha256
    assert after.weights_sha256["ema"] != after.weights_sha256["model"]
    assert after.config == config
    assert after.info["nimg"] == 10 * 128
    assert after.info["compute"] == 10 * 128 * before.info["flops_per_image"]
    assert after.info["data"] == "unknown"
    assert {kind: file["name"] for kind, file in after.info["source"]["files"].items()} == {
        "ema": "ema_0.9999_000010.pt", "model": "model000010.pt",
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "the layout before torch 1.6"])
def test_their_file_comes_back_the_same(small: Path, tmp_path: Path, zipped: bool) -> None:
    # 16x16 images have no preset there, so their programs cannot be told; the weights are taken out by hand.
    state = random_state(THEIR_SHAPES)
    config = load_config(small, TWO_LEVELS)
    path = save(state, tmp_path / "ema_0.9999_10.pt", _use_new_zipfile_serialization=zipped)
    import_checkpoint(path, tmp_path / "out", config)
    ours = open_export(tmp_path / "out").tensors("ema")
    assert torch.equal(ours["stem.weight"], state["input_blocks.0.0.weight"])
    assert torch.equal(ours["encoder.1.weight"], state["input_blocks.2.0.op.weight"])
    assert torch.equal(ours["middle.0.attention.qkv.weight"].squeeze(-1), state["middle_block.1.qkv.weight"])
    assert torch.equal(ours["middle.1.res.conv2.bias"], state["middle_block.2.out_layers.3.bias"])
    assert torch.equal(ours["decoder.2.conv.weight"], state["output_blocks.1.2.conv.weight"])
    back = {p.theirs: ours[p.ours].reshape(p.shape) for p in improved_diffusion.pairs(meta_network(config))}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_is_widened_and_shared_memory_is_fine(small: Path, tmp_path: Path) -> None:
    state = random_state(THEIR_SHAPES)
    narrow = {key: tensor.to(torch.float16 if "bias" in key else torch.bfloat16) for key, tensor in state.items()}
    narrow["out.0.weight"] = narrow["input_blocks.1.0.in_layers.0.weight"]
    import_checkpoint(save(narrow, tmp_path / "ema_0.9999_10.pt"), tmp_path / "out", load_config(small, TWO_LEVELS))
    ours = open_export(tmp_path / "out").tensors("ema")
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    assert torch.equal(ours["out_conv.weight"], state["out.2.weight"].bfloat16().float())
    assert torch.equal(ours["out_norm.weight"], ours["encoder.0.res.norm1.weight"])


# Exports with one of the two kinds of weights


def test_an_import_of_one_file_has_only_that_kind(small: Path, tmp_path: Path) -> None:
    config = load_config(small, TWO_LEVELS)
    state = random_state(THEIR_SHAPES)
    for name, there, absent in (("ema_0.9999_10.pt", "ema", "model"), ("model000010.pt", "model", "ema")):
        import_checkpoint(save(state, tmp_path / name), tmp_path / there, config)
        export = open_export(tmp_path / there)
        assert set(export.weights_sha256) == {there}
        export.network(there)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"weights={absent}.*holds only {there}"):
            export.network(absent)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"weights=model.*holds only ema"):
        export_checkpoint(tmp_path / "ema", tmp_path / "x.pt", weights="model")


def test_an_imported_export_can_be_evaluated(tiny_config: Path, generated_data: Path, tmp_path: Path) -> None:
    from evaluation.evaluate import evaluate
    from evaluation.nll.settings import NllSettings
    from evaluation.request import EvalRequest

    config = load_config(tiny_config)
    state = random_state({p.theirs: p.shape for p in improved_diffusion.pairs(meta_network(config))})
    info = import_checkpoint(save(state, tmp_path / "ema_0.9_5.pt"), tmp_path / "out", config)
    request = EvalRequest(data=generated_data / "test", nll=NllSettings(num_calls=256), num_threads=1)
    (record,) = evaluate(tmp_path / "out", request, progress=False)
    assert (record.nimg, record.compute) == (40, 40 * info["flops_per_image"])
    assert record.run == info["run"] == f"imported-{info['source']['files']['ema']['sha256'][:16]}"
    with pytest.raises(UserError, match="holds only ema"):
        evaluate(
            tmp_path / "out", EvalRequest(data=generated_data / "test", nll=NllSettings(num_calls=256), weights="model")
        )


def test_an_import_exists_completely_or_not_at_all(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = save(random_state(THEIR_SHAPES), tmp_path / "ema_0.9999_10.pt")
    folder = tmp_path / "imported"
    with monkeypatch.context() as patch:
        patch.setattr("trainer.export.write_json", full)
        with pytest.raises(OSError, match="No space"):
            import_checkpoint(path, folder / "one", load_config(small, TWO_LEVELS))
    assert list(folder.iterdir()) == []
    (folder / "one").mkdir()  # an empty folder is fine, one with something in it is not
    import_checkpoint(path, folder / "one", load_config(small, TWO_LEVELS))
    with pytest.raises(UserError, match="there already"):
        import_checkpoint(path, folder / "one", load_config(small, TWO_LEVELS))


# Files that are refused


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "inside"])
def test_a_malicious_file_is_refused_and_not_executed(tmp_path: Path, how: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "ema_0.9999_10.pt"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"out.2.bias": Evil(marker)}))
    else:
        content = {"out.2.bias": torch.zeros(6), "x": Evil(marker)} if how == "inside" else Evil(marker)
        save(content, path, _use_new_zipfile_serialization=how != "legacy")
    said = "is damaged or no file" if how == "plain pickle" else r"asks for _?io\.open, .*nothing of it was run"
    with pytest.raises(UserError, match=said):
        read_pt(path)
    assert not marker.exists()
    with open(path, "rb") as file:  # the attack is a real one
        torch.load(file, weights_only=False) if how != "plain pickle" else pickle.load(file)
    assert marker.exists()


def test_a_pickled_object_is_named(tmp_path: Path) -> None:
    path = save(torch.nn.Linear(2, 2), tmp_path / "model000010.pt")
    with pytest.raises(UserError, match=r"asks for torch\.nn\.modules\.linear\.Linear.*refused.*state_dict"):
        read_pt(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, zipped: bool, share: float) -> None:
    path = save(random_state(THEIR_SHAPES), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"x\.pt is damaged or no file of weights"):
        read_pt(path)


def test_a_flipped_byte_is_found_and_its_place_named(tmp_path: Path) -> None:
    path = save({"out.2.bias": torch.zeros(1000), "out.2.weight": torch.zeros(1000)}, tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/1"))
    content[member.header_offset + 1000] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True).keys() == {"out.2.bias", "out.2.weight"}  # torch takes it
    with pytest.raises(UserError, match=rf"x\.pt is damaged: {member.filename} in it fails its checksum; copy"):
        read_pt(path)


def test_no_flipped_byte_changes_the_weights_unseen(tmp_path: Path) -> None:
    tensors, path = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}, tmp_path / "x.pt"
    content = save(tensors, path).read_bytes()
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            found = read_pt(path)
        except UserError:
            refused += 1
        else:  # a byte that says nothing: padding, a time
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensors[key]) for key in tensors), place
    assert refused > len(content) // 3


def optimizer_state() -> Any:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (optimizer_state(), r"optimizer's state.*ema_\*\.pt"),
        ({"state_dict": {"out.2.bias": torch.zeros(6)}}, r"'state_dict': dict; expected a plain state dict"),
        ([torch.zeros(6)], "holds a list"),
        ({"out.2.bias": torch.zeros(6, dtype=torch.int64)}, r"out\.2\.bias is int64.*expected dense float32"),
        ({"out.2.bias": torch.zeros(6, dtype=torch.float64)}, r"out\.2\.bias is float64.*\.float\(\) on each"),
        ({"out.2.bias": torch.zeros(6).to_sparse()}, r"out\.2\.bias is float32 sparse"),
        ({"out.2.bias": torch.zeros(6, device="meta")}, r"out\.2\.bias is .* on meta"),
    ],
    ids=["optimizer", "nested", "list", "integers", "float64", "sparse", "meta"],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_pt(save(content, tmp_path / "opt000010.pt"))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pt is not there"):
        read_pt(tmp_path / "gone.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_pt(tmp_path)


@pytest.mark.parametrize("names", [("gone.pt", None), ("model10.pt", "gone.pt")])
def test_a_missing_file_is_told_before_anything_about_names(
    small: Path, tmp_path: Path, names: tuple[str, str | None]
) -> None:
    (tmp_path / "model10.pt").touch()
    first, second = (None if name is None else tmp_path / name for name in names)
    assert first is not None
    with pytest.raises(UserError, match=r"gone\.pt is not there"):
        import_checkpoint(first, tmp_path / "out", load_config(small, TWO_LEVELS), model=second)


def test_a_place_below_a_file_is_refused(small: Path, tmp_path: Path) -> None:
    path = save(random_state(THEIR_SHAPES), tmp_path / "ema_0.9999_10.pt")
    with pytest.raises(UserError, match=r"--out .*10\.pt/a/b: .*10\.pt is a file, not a folder"):
        import_checkpoint(path, path / "a" / "b", load_config(small, TWO_LEVELS))
    export = our_export(tmp_path / "export", load_config(small), kinds=("ema",))
    with pytest.raises(UserError, match=r"--out .*10\.pt/x\.pt: .*10\.pt is a file, not a folder"):
        export_checkpoint(export.path, path / "x.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(small: Path, tmp_path: Path, value: float) -> None:
    state = random_state(THEIR_SHAPES)
    state["middle_block.1.qkv.weight"][3, 4, 0] = value
    path = save(state, tmp_path / "ema_0.9999_10.pt")
    with pytest.raises(UserError, match=r"middle_block\.1\.qkv\.weight has values that are not finite"):
        import_checkpoint(path, tmp_path / "out", load_config(small, TWO_LEVELS))
    assert not (tmp_path / "out").exists()


# Files that do not fit


def misfit(state: dict[str, Tensor], config: RunConfig, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_checkpoint(save(state, tmp_path / "ema_0.9999_10.pt"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_every_key_that_does_not_fit_is_listed(small: Path, tmp_path: Path) -> None:
    state = random_state(THEIR_SHAPES)
    del state["out.0.weight"]
    del state["middle_block.1.norm.bias"]
    state["input_blocks.9.0.op.bias"] = torch.zeros(1)
    state["out.2.bias"] = torch.zeros(3)
    text = misfit(state, load_config(small, TWO_LEVELS), tmp_path)
    assert "2 missing:\n  middle_block.1.norm.bias\n  out.0.weight\n" in text
    assert "1 unexpected:\n  input_blocks.9.0.op.bias\n" in text
    assert "1 of another shape:\n  out.2.bias: [3], expected [6]\n" in text
    assert "Presets that fit: none." in text


def test_a_wrong_preset_is_told_by_what_differs_and_which_would_fit(tmp_path: Path) -> None:
    network = meta_network(preset("imagenet64/ladder/c64"))
    state = {p.theirs: torch.zeros(1).expand(p.shape) for p in improved_diffusion.pairs(network)}
    text = misfit(state, preset("imagenet64/hybrid"), tmp_path)
    assert "model.channels: the file's network has 64, the config 128." in text
    assert "Presets that fit: imagenet64/ladder/c64." in text
    assert "num_res_blocks" not in text
    listed = [line for line in text.splitlines() if "expected [" in line]
    assert len(listed) == 20  # of hundreds
    assert "more" in text
    several = misfit(state, preset("lsun256/bedroom"), tmp_path)
    assert "model.channel_mult: the file's network has (1, 2, 3, 4), the config (1, 1, 2, 2, 4, 4)." in several
    assert "model.num_res_blocks: the file's network has 3, the config 2." in several
    assert "model.use_scale_shift_norm: the file's network has True, the config False." in several


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["model.num_classes=1000"], "model.num_classes: the file's network has 0, the config 1000."),
        (["model.low_res_size=4"], "model.low_res_size > 0: the file's network has False, the config True."),
        (
            ["model.attention_resolutions=[16,8]"],
            "model.attention_resolutions (at 16 pixels): the file's network has (8,), the",
        ),
        (["diffusion.variance=fixed_small", "diffusion.objective=simple"], "a learned diffusion.variance: the file's"),
        (["model.num_res_blocks=2"], "model.num_res_blocks: the file's network has 1, the config 2."),
    ],
)
def test_hints_name_the_setting(small: Path, tmp_path: Path, override: list[str], said: str) -> None:
    text = misfit(random_state(THEIR_SHAPES), load_config(small, [*TWO_LEVELS, *override]), tmp_path)
    assert said in text
    assert text.count("the file's network has") == 1


def test_the_prefix_of_a_wrapped_network_is_told_with_its_remedy(small: Path, tmp_path: Path) -> None:
    state = {f"module.{key}": tensor for key, tensor in random_state(THEIR_SHAPES).items()}
    text = misfit(state, load_config(small, TWO_LEVELS), tmp_path)
    assert "all keys start with 'module.'" in text
    assert "key.removeprefix('module.')" in text
    assert "missing" not in text


def test_a_file_of_another_code_base_is_told_plainly(small: Path, tmp_path: Path) -> None:
    text = misfit({"conv1.weight": torch.zeros(3, 3)}, load_config(small, TWO_LEVELS), tmp_path)
    assert f"{len(THEIR_SHAPES)} missing:" in text
    assert "1 unexpected:\n  conv1.weight\n" in text


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (7,), (1, 1, 1, 1, 1)])
def test_tensors_of_any_shape_under_their_names_are_told_plainly(
    small: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    state = {key: torch.zeros(shape) for key in [*THEIR_SHAPES, "label_emb.weight"]}
    text = misfit(state, load_config(small, TWO_LEVELS), tmp_path)
    assert "1 unexpected:\n  label_emb.weight\n" in text
    assert f"time_embed.0.weight: {list(shape)}, expected [128, 32]" in text
    for key in THEIR_SHAPES:  # and where only one of them is off
        one = {name: torch.zeros(shape if name == key else wanted) for name, wanted in THEIR_SHAPES.items()}
        if one[key].shape != THEIR_SHAPES[key]:
            shapes = {name: tuple(tensor.shape) for name, tensor in one.items()}
            improved_diffusion.differing_settings(shapes, load_config(small, TWO_LEVELS))


# What names of files tell


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ema_0.9999_500000.pt", FileName("ema", 500_000, ema_decay=0.9999)),
        ("ema_0.999_010000.pt", FileName("ema", 10_000, ema_decay=0.999)),
        ("model000500.pt", FileName("model", 500)),
        ("model1500000.pt", FileName("model", 1_500_000)),
        ("cifar10_uncond_50M_500K.pt", FileName("ema", 500_000)),
        ("cifar10_uncond_vlb_50M_500K.pt", FileName("ema", 500_000)),
        ("imagenet64_uncond_100M_1500K.pt", FileName("ema", 1_500_000)),
        ("imagenet64_uncond_vlb_100M_1500K.pt", FileName("ema", 1_500_000)),
        ("imagenet64_cond_270M_250K.pt", FileName("ema", 250_000)),
        ("upsample_cond_500K.pt", FileName("ema", 500_000)),
        ("lsun_uncond_100M_1200K_bs128.pt", FileName("ema", 1_200_000, batch=128)),
        ("lsun_uncond_100M_2400K_bs64.pt", FileName("ema", 2_400_000, batch=64)),
        ("mine.pt", FileName()),
        ("network_270M.pt", FileName()),
    ],
)
def test_names(name: str, expected: FileName) -> None:
    assert improved_diffusion.read_name(name) == expected


def test_images_seen_come_from_the_name_or_are_asked_for(small: Path, tmp_path: Path) -> None:
    config = load_config(small, TWO_LEVELS)
    path = save(random_state(THEIR_SHAPES), tmp_path / "mine.pt")
    with pytest.raises(UserError, match=r"mine\.pt tells no number of iterations; give --images"):
        import_checkpoint(path, tmp_path / "out", config)
    assert import_checkpoint(path, tmp_path / "out", config, images=77)["nimg"] == 77


@pytest.mark.parametrize(
    ("name", "said", "override"),
    [
        ("x_10M_1K_bs64.pt", r"train\.global_batch=128.*tells 64; add train\.global_batch=64", "train.global_batch=64"),
        ("ema_0.99_1000.pt", r"train\.ema_decay=0\.9999.*tells 0\.99; add train\.ema_decay=0\.99",
         "train.ema_decay=0.99"),
    ],
)  # fmt: skip
def test_a_name_that_contradicts_the_config_is_refused(
    small: Path, tmp_path: Path, name: str, said: str, override: str
) -> None:
    path = save(random_state(THEIR_SHAPES), tmp_path / name)
    with pytest.raises(ConfigError, match=said):
        import_checkpoint(path, tmp_path / "out", load_config(small, TWO_LEVELS))
    config = load_config(small, [*TWO_LEVELS, override])
    assert import_checkpoint(path, tmp_path / "out", config)["nimg"] == 1000 * config.train.global_batch


def test_two_files_must_be_of_one_moment_and_of_two_kinds(small: Path, tmp_path: Path) -> None:
    config = load_config(small, TWO_LEVELS)
    state = random_state(THEIR_SHAPES)
    ema, later = (save(state, tmp_path / name) for name in ("ema_0.9999_10.pt", "model000020.pt"))
    with pytest.raises(UserError, match="different numbers of iterations"):
        import_checkpoint(ema, tmp_path / "out", config, model=later)
    with pytest.raises(UserError, match="holds the bare weights, and so does --model"):
        import_checkpoint(later, tmp_path / "out", config, model=later)


# Files that we write


def test_a_file_is_written_without_a_copy_in_memory(tmp_path: Path) -> None:
    tensors = {str(number): torch.zeros(1 << 18) for number in range(16)}  # 1 MiB each
    tracemalloc.start()  # sees Python's buffers, not torch's
    write_pt(tmp_path / "new" / "x.pt", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert read_pt(tmp_path / "new" / "x.pt").keys() == tensors.keys()


def test_a_file_exists_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, file: Any) -> None:
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_pt(tmp_path / "x.pt", {})
    assert list(tmp_path.iterdir()) == []


# What their programs are told


def test_flags_of_a_published_run_and_of_an_upsampler() -> None:
    model, diffusion = improved_diffusion.flags(preset("lsun256/bedroom"))
    assert model == (
        'MODEL_FLAGS="--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --attention_resolutions 16 '
        '--dropout 0.0 --class_cond False --use_scale_shift_norm False --learn_sigma True --sigma_small False"'
    )
    assert diffusion == (
        'DIFFUSION_FLAGS="--diffusion_steps 1000 --noise_schedule linear --predict_xstart False '
        '--rescale_timesteps False --rescale_learned_sigmas False --use_kl False"'
    )
    upsampler = improved_diffusion.flags(preset("imagenet256/upsampler"))[0]
    assert "--large_size 256 --small_size 64" in upsampler
    assert "--image_size" not in upsampler
    assert "--sigma_small" not in upsampler  # their super-resolution programs know no such flag
    assert "--use_kl True" in improved_diffusion.flags(preset("imagenet64/vlb"))[1]


@pytest.mark.parametrize(
    ("overrides", "flag"),
    [
        (["diffusion.prediction=x0"], "--predict_xstart True"),
        (["diffusion.variance=fixed_small", "diffusion.objective=simple"], "--learn_sigma False --sigma_small True"),
        (["diffusion.variance=fixed_large", "diffusion.objective=simple"], "--learn_sigma False --sigma_small False"),
        (["model.attention_resolutions=[]"], "--attention_resolutions 1 "),
        (["model.attention_resolutions=[64,8]"], "--attention_resolutions 8 "),
        (["diffusion.vlb_weight=0.5"], "# training only: no flag for diffusion.vlb_weight=0.5"),
        (["diffusion.mse_target=x0"], "# training only: no flag for diffusion.mse_target=x0"),
        (["diffusion.loss_weight=min_snr"], "# training only: no flag for diffusion.loss_weight=min_snr"),
    ],
)
def test_settings_become_flags(small: Path, overrides: list[str], flag: str) -> None:
    assert flag in "\n".join(improved_diffusion.flags(load_config(small, overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.prediction=v"],
        ["diffusion.prediction=previous_mean"],
        ["diffusion.variance=learned"],
        ["diffusion.schedule=sigmoid"],
        ["model.null_class=true", "model.num_classes=1000"],
        ["model.num_classes=10"],
        ["model.channels=48"],
        ["model.image_size=128"],
        ["model.channel_mult=[1,2]"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_they_cannot_express_is_refused_by_key_and_value(
    small: Path, tmp_path: Path, overrides: list[str]
) -> None:
    export = our_export(tmp_path / "export", load_config(small, overrides), kinds=("ema",))
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(export.path, tmp_path / "ema_0.9999_10.pt")
    key, value = overrides[0].replace("[1,2]", "[1, 2]").split("=")
    assert f"{key}={value}: " in str(caught.value)
    assert str(caught.value).count("\n") == 1  # this one reason and no other
    assert not (tmp_path / "ema_0.9999_10.pt").exists()


# The command line


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["interop", *map(str, arguments)])
    return main()


def test_the_command_line_there_and_back(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(small, ["model.num_classes=1000"])
    state = random_state({p.theirs: p.shape for p in improved_diffusion.pairs(meta_network(config))})
    path = save(state, tmp_path / "ema_0.9999_000100.pt")
    run_main(
        monkeypatch, "import", path, "model.num_classes=1000", "--preset", small, "--out", tmp_path / "out",
        "train.global_batch=64",
    )  # fmt: skip
    assert "6,400 images seen" in capsys.readouterr().out
    run_main(monkeypatch, "export", tmp_path / "out", "--out", tmp_path / "back.pt")
    assert "--class_cond True" in capsys.readouterr().out
    back = read_pt(tmp_path / "back.pt")
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(UserError, match=r"back\.pt is there already"):
        run_main(monkeypatch, "export", tmp_path / "out", "--out", tmp_path / "back.pt")


@pytest.mark.parametrize(
    ("name", "kind", "advice"),
    [
        ("ema_0.9999_10.pt", "unconditional", "evaluation.evaluate {out} --data SPLIT"),
        ("model10.pt", "unconditional", "evaluation.evaluate {out} --data SPLIT --weights model"),
        ("ema_0.9999_10.pt", "upsampler", "evaluation.sample BASE {out} --out samples.npz"),
        ("model10.pt", "upsampler", "evaluation.sample BASE {out} --out samples.npz --weights model"),
    ],
)
def test_the_advice_suits_the_network(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, kind: str, advice: str,
) -> None:  # fmt: skip
    config, out = load_config(small, KINDS[kind]), tmp_path / "out"
    state = random_state({p.theirs: p.shape for p in improved_diffusion.pairs(meta_network(config))})
    run_main(monkeypatch, "import", save(state, tmp_path / name), "--preset", small, "--out", out, *KINDS[kind])
    assert capsys.readouterr().err.endswith(f": python -m {advice.format(out=out)}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "x.pt", "--preset", "p", "--out", "o", "--imagse", "3"], "--imagse"),
        (["import", "x.pt", "--preset", "p", "--out", "o", "cifar10"], "cifar10"),
        (["export", "e", "--out", "o", "model.channels=3"], "model.channels=3"),
    ],
)
def test_unknown_arguments_are_named(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown argument '{said}'"):
        parse_arguments(arguments)


def test_errors_of_the_command_line_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["import", "x.pt", "--preset", "cifar10/hybird", "--out", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", ["interop", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2
    assert "did you mean cifar10/hybrid" in capsys.readouterr().err
