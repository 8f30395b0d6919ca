"""Tensors come back bit by bit, in memory of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.tensors import reader
from pipeline.tensors.dtypes import ITEM_BITS, TORCH_DTYPES
from pipeline.tensors.index import read_index
from pipeline.tensors.reader import check_finite, read_tensors
from pipeline.tensors.writer import write_safetensors

Reader = Callable[[str, int, int], bytes]


def stored(folder: Path, read: Reader, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    write_safetensors(folder / "model.safetensors", tensors, {})
    sizes = {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    return read_tensors(folder, read_index(sizes, read), tensors)


# The safetensors package writes E8M0 but gives it no torch type when it reads: that one has a test of its own.
@pytest.mark.parametrize("name", sorted(TORCH_DTYPES.keys() - {"F8_E8M0"}))
def test_every_dtype_comes_back_bit_by_bit(tmp_path: Path, folder_reader: Reader, name: str) -> None:
    dtype = TORCH_DTYPES[name]
    num_values = 15
    raw = torch.arange(num_values * dtype.itemsize, dtype=torch.int64).mul(37).remainder(2 if name == "BOOL" else 251)
    value = raw.to(torch.uint8).view(dtype).reshape(3, 5)
    assert ITEM_BITS[name] == 8 * dtype.itemsize
    # An odd neighbour first in the file moves the tensor off any alignment.
    back = stored(tmp_path, folder_reader, {"w": value, "odd": torch.ones(3, dtype=torch.uint8), "scalar": value[0, 0]})
    assert back["w"].dtype is dtype
    assert back["w"].shape == (3, 5)
    assert back["scalar"].shape == ()
    assert torch.equal(back["w"].view(torch.uint8), value.contiguous().view(torch.uint8))


def test_scale_type_e8m0_is_read(tmp_path: Path, folder_reader: Reader, build_file: Any, tensor: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(build_file({"s": tensor(0, 2, "F8_E8M0")}, bytes([127, 128])))
    found = read_index({"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}, folder_reader)
    assert read_tensors(tmp_path, found, ["s"])["s"].to(torch.float32).tolist() == [1.0, 2.0]


def test_sub_byte_types_are_refused_by_name(
    tmp_path: Path, folder_reader: Reader, build_file: Any, tensor: Any
) -> None:
    (tmp_path / "model.safetensors").write_bytes(build_file({"w": tensor(0, 2, "F4", [4])}, b"ab"))
    found = read_index({"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}, folder_reader)
    with pytest.raises(CorruptWeightsError, match="'w' has dtype F4, which torch cannot hold"):
        read_tensors(tmp_path, found, ["w"])


def test_a_bool_other_than_0_and_1_is_refused(
    tmp_path: Path, folder_reader: Reader, build_file: Any, tensor: Any
) -> None:
    (tmp_path / "model.safetensors").write_bytes(build_file({"m": tensor(0, 2, "BOOL")}, b"\x01\x02"))
    found = read_index({"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}, folder_reader)
    with pytest.raises(CorruptWeightsError, match="'m' is BOOL"):
        read_tensors(tmp_path, found, ["m"])


def test_only_the_ranges_of_the_named_tensors_are_read(
    tmp_path: Path, folder_reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: torch.full((100,), float(i)) for i, name in enumerate("abcd")}
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    found = read_index({"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}, folder_reader)
    asked: list[tuple[int, int]] = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((offset, offset + len(buffers[0])))
        return os.readv(descriptor, buffers) if os.lseek(descriptor, offset, os.SEEK_SET) >= 0 else 0

    monkeypatch.setattr("pipeline.tensors.reader.os.preadv", preadv)
    back = read_tensors(tmp_path, found, ["d", "b"])
    assert list(back) == ["d", "b"]
    assert torch.equal(back["b"], tensors["b"])
    spans = [(found.entries[name][1].start_bytes, found.entries[name][1].end_bytes) for name in "bd"]
    assert asked == spans


def test_long_reads_are_put_together(tmp_path: Path, folder_reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_READ_BYTES", 7)
    value = torch.randn(33)
    assert torch.equal(stored(tmp_path, folder_reader, {"w": value})["w"], value)


def test_tensors_do_not_depend_on_the_file_afterwards(tmp_path: Path, folder_reader: Reader) -> None:
    back = stored(tmp_path, folder_reader, {"w": torch.ones(1000)})["w"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    back += 1
    assert torch.equal(back, torch.full((1000,), 2.0))


def test_what_changed_since_the_index_is_an_error(tmp_path: Path, folder_reader: Reader) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": torch.ones(1000)}, {})
    found = read_index({path.name: path.stat().st_size}, folder_reader)
    with pytest.raises(CorruptWeightsError, match=r"tensor 'v' is in none of model\.safetensors"):
        read_tensors(tmp_path, found, ["v"])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptWeightsError, match="ends 4 bytes before tensor 'w' does"):
        read_tensors(tmp_path, found, ["w"])
    path.unlink()
    with pytest.raises(SourceNotFoundError, match=r"model\.safetensors is not there any more"):
        read_tensors(tmp_path, found, ["w"])


@pytest.mark.parametrize(
    ("target", "reason"),
    [("model.safetensors", "Too many levels of symbolic links"), ("/proc/self/mem", "Input/output error")],
)
def test_a_file_that_cannot_be_opened_or_read_is_named_with_the_reason(
    tmp_path: Path, folder_reader: Reader, target: str, reason: str
) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": torch.ones(1000)}, {})
    found = read_index({path.name: path.stat().st_size}, folder_reader)
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(SourceNotFoundError) as caught:
        read_tensors(tmp_path, found, ["w"])
    assert caught.value.message == f"{path} cannot be read: {reason}"
    assert caught.value.code == "source.unreadable"


def test_an_empty_tensor_of_the_widest_shape_is_read(
    tmp_path: Path, folder_reader: Reader, build_file: Any, tensor: Any
) -> None:
    (tmp_path / "model.safetensors").write_bytes(build_file({"w": tensor(0, 0, "F32", [0, 2**63 - 1])}))
    found = read_index({"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}, folder_reader)
    assert read_tensors(tmp_path, found, ["w"])["w"].shape == (0, 2**63 - 1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2, torch.complex64]
)
def test_not_finite_values_are_counted_and_placed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FINITE_CHUNK_ELEMENTS", 5)
    values = torch.zeros(4, 6)
    values[2, 3] = float("nan")
    values[2, 5] = float("-inf")
    values[3, 0] = float("inf")
    with pytest.raises(CorruptWeightsError) as caught:
        check_finite("model.w", values.to(dtype))
    assert "tensor 'model.w' has 1 NaN and 2 infinite of 24 values, the first at [2, 3]" in caught.value.message


def test_a_float8_without_infinity_shows_its_nan() -> None:
    with pytest.raises(CorruptWeightsError, match="1 NaN and 0 infinite"):
        check_finite("w", torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.bfloat16])
def test_finite_values_and_integers_pass(dtype: torch.dtype) -> None:
    check_finite("w", torch.ones(3, 4).to(dtype))
    check_finite("w", torch.ones(0, 4).to(dtype))
