"""What was written is compared with what was meant, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import CorruptWeightsError
from pipeline.tensors import local
from pipeline.tensors.local import copy_problems
from pipeline.tensors.writer import write_safetensors

TENSORS = {
    "matrix": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
    "scalar": torch.tensor(3.5),
    "not a number": torch.tensor([float("nan"), -0.0, float("inf")]),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 3),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, TENSORS, {})
    return path


def test_equal_tensors_have_no_problems(written: Path) -> None:
    assert copy_problems(written, TENSORS) == []
    assert copy_problems(written, {"matrix": TENSORS["matrix"].t().contiguous().t()}) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("matrix", TENSORS["matrix"].clone().index_fill_(0, torch.tensor([3]), 0)),
        ("matrix", TENSORS["matrix"].half()),
        ("matrix", TENSORS["matrix"].view(6, 4)),
        ("matrix", TENSORS["matrix"][:, :5]),
        ("not a number", torch.tensor([float("nan"), 0.0, float("inf")])),
        ("scalar", torch.tensor([3.5])),
        ("none", torch.empty(3, 0)),
    ],
)
def test_what_differs_in_a_bit_a_shape_or_a_dtype_is_named(written: Path, name: str, other: Tensor) -> None:
    assert copy_problems(written, {**TENSORS, name: other}) == [f"{name} was not copied bit for bit"]


def test_what_is_missing_is_named(written: Path) -> None:
    assert copy_problems(written, {"other": torch.zeros(1)}) == ["other is not in the written file"]


def test_a_difference_in_any_chunk_is_found(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CHUNK_BYTES", 7)
    assert copy_problems(written, TENSORS) == []
    for place in range(24):
        other = TENSORS["matrix"].clone()
        other.view(-1)[place] += 1
        assert copy_problems(written, {"matrix": other}) == ["matrix was not copied bit for bit"]


def test_a_file_that_was_cut_short_is_an_error(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-3])
    with pytest.raises(CorruptWeightsError):
        copy_problems(written, TENSORS)
