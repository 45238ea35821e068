"""Our writer's files are safetensors files, as the library reads them, and hold what their entry says."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.files import sha256_file
from trainer.tensor_files import write_mapping, write_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64])


@settings(deadline=None, max_examples=50)
@given(specs=st.dictionaries(st.text(st.characters(categories=["L", "N"]), min_size=1), st.tuples(SHAPES, DTYPES)))
def test_the_library_reads_what_was_written(specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    import tempfile

    tensors = {name: (100 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in specs.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        entry = write_mapping(path, tensors)
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_one_tensor_is_asked_for_at_a_time_and_views_are_written_right(tmp_path: Path) -> None:
    base, asked = torch.arange(12.0).view(3, 4), []

    def read(name: str) -> Tensor:
        asked.append((name, (tmp_path / "x").stat().st_size))
        return base.t() if name == "transposed" else base[:, 1]

    write_tensors(tmp_path / "x", {"transposed": ((4, 3), base.dtype), "column": ((3,), base.dtype)}, read)
    assert [name for name, _ in asked] == ["transposed", "column"]
    assert torch.equal(load_file(tmp_path / "x")["transposed"], base.t())
    assert torch.equal(load_file(tmp_path / "x")["column"], base[:, 1])


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    write_mapping(tmp_path / "x", {"a": torch.zeros(1)})
    (tmp_path / "y").touch()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)


def test_a_tensor_of_another_shape_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a"):
        write_tensors(tmp_path / "x", {"a": ((2,), torch.float32)}, lambda _: torch.zeros(3))
