"""A header is trusted only when it tiles its file exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import CorruptWeightsError
from pipeline.tensors.header import FIRST_READ_BYTES, TensorEntry, parse_header, read_header

Build = Callable[..., bytes]
Entry = Callable[..., dict[str, Any]]


def refusal(data: bytes, file_bytes: int | None = None) -> CorruptWeightsError:
    with pytest.raises(CorruptWeightsError) as caught:
        parse_header(data, len(data) if file_bytes is None else file_bytes, "model.safetensors")
    assert "model.safetensors" in caught.value.message
    assert "fetch the file again" in caught.value.hint
    return caught.value


def test_a_file_of_the_safetensors_package_is_read_whole(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.zeros(4), "empty": torch.zeros(0, 7)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "x.safetensors").read_bytes()
    header = parse_header(data, len(data), "x.safetensors")
    start = header.header_bytes
    assert header.metadata == {"format": "pt"}
    assert header.entries == {
        "empty": TensorEntry("empty", "F32", (0, 7), start + 16, start + 16),
        "a": TensorEntry("a", "F32", (4,), start, start + 16),
        "b": TensorEntry("b", "BF16", (2, 3), start + 16, start + 28),
    }
    assert [entry.num_elements for entry in header.entries.values()] == [4, 0, 6]


def test_a_scalar_and_an_empty_file_are_legal(build_file: Build, tensor: Entry) -> None:
    scalar = build_file({"s": tensor(0, 4, "F32", [])}, b"1234")
    assert parse_header(scalar, len(scalar), "x").entries["s"].shape == ()
    nothing = build_file({})
    assert parse_header(nothing, len(nothing), "x").entries == {}


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_truncated(size: int) -> None:
    assert "truncated" in refusal(b"\x01" * size).message


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001])
def test_a_huge_length_is_refused_without_reading_on(build_file: Build, length: int) -> None:
    assert "above the format's limit" in refusal(build_file({}, length=length), file_bytes=2**62).message


def test_a_length_beyond_the_file_is_truncated(build_file: Build) -> None:
    assert "truncated" in refusal(build_file({}, length=5000)).message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "does not start with '{'"),
        (b" {}", "does not start with '{'"),
        (b"\x80\x04pickle", "does not start with '{'"),
        (b"{", "not a UTF-8 JSON object"),
        (b'{"\xff": 1}', "not a UTF-8 JSON object"),
        ('{"a": 1}'.encode("utf-16-le"), "not a UTF-8 JSON object"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a UTF-8 JSON object"),
        (b'{"a": {}, "a": {}}', "'a' occurs twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}', "'dtype' occurs twice"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
        (b'{"": {}}', "empty or not printable"),
        (b'{"a\\u0007": {}}', "empty or not printable"),
        (b'{"\\ud800": {}}', "empty or not printable"),
    ],
)
def test_json_that_is_no_header_is_refused(build_file: Build, text: bytes, reason: str) -> None:
    assert reason in refusal(build_file(text)).message


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (5, "needs dtype, shape and data_offsets"),
        ({"dtype": "U8", "shape": [1]}, "needs dtype, shape and data_offsets"),
        ({"dtype": "Q4", "shape": [8], "data_offsets": [0, 8]}, "dtype 'Q4' is unknown"),
        ({"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]}, "is unknown"),
        ({"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}, "not a list of non-negative integers"),
        ({"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}, "not a list of non-negative integers"),
        ({"dtype": "U8", "shape": [True], "data_offsets": [0, 8]}, "not a list of non-negative integers"),
        ({"dtype": "U8", "shape": 8, "data_offsets": [0, 8]}, "not a list of non-negative integers"),
        ({"dtype": "U8", "shape": [8], "data_offsets": [0, 8, 9]}, "not two non-negative integers"),
        ({"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}, "run backwards"),
        ({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}, "truncated or its header lies"),
        ({"dtype": "F32", "shape": [8], "data_offsets": [0, 8]}, "does not take the 8 bytes"),
        ({"dtype": "U8", "shape": [2**40] * 50, "data_offsets": [0, 8]}, "does not take the 8 bytes"),
        ({"dtype": "F4", "shape": [15], "data_offsets": [0, 8]}, "does not take the 8 bytes"),
        ({"dtype": "U8", "shape": [2**70, 0], "data_offsets": [0, 8]}, "has a size that no tensor can have"),
        ({"dtype": "U8", "shape": [0, 2**63], "data_offsets": [8, 8]}, "has a size that no tensor can have"),
        ({"dtype": "U8", "shape": [2**62, 0], "data_offsets": [0, 8]}, "does not take the 8 bytes"),
    ],
)
def test_a_lying_tensor_is_named(build_file: Build, entry: Any, reason: str) -> None:
    error = refusal(build_file({"model.weird": entry}, b"12345678"))
    assert reason in error.message
    assert error.context["tensor"] == "model.weird"


def test_overlap_hole_and_rest_are_refused(build_file: Build, tensor: Entry) -> None:
    overlap = refusal(build_file({"a": tensor(0, 4), "b": tensor(2, 8)}, b"12345678"))
    assert "tensor 'b': its data overlaps that of tensor 'a'" in overlap.message
    hole = refusal(build_file({"a": tensor(0, 4), "b": tensor(6, 8)}, b"12345678"))
    assert "tensor 'b': 2 bytes between tensor 'a' and it belong to nothing" in hole.message
    rest = refusal(build_file({"a": tensor(0, 4)}, b"12345678"))
    assert "4 bytes after tensor 'a' belong to no tensor" in rest.message


def test_sub_byte_types_are_measured_in_bits(build_file: Build, tensor: Entry) -> None:
    data = build_file({"a": tensor(0, 8, "F4", [16]), "b": tensor(8, 11, "F6_E2M3", [4])}, b"x" * 11)
    assert [entry.num_bytes for entry in parse_header(data, len(data), "x").entries.values()] == [8, 3]


def test_a_header_is_read_in_at_most_two_ranges(build_file: Build, tensor: Entry) -> None:
    asked: list[tuple[int, int]] = []

    def reader(data: bytes) -> Callable[[str, int, int], bytes]:
        def read(path: str, start: int, end: int) -> bytes:
            asked.append((start, end))
            return data[start:end]

        return read

    small = build_file({"a": tensor(0, 4)}, b"1234")
    assert read_header(reader(small), "x", len(small)).entries["a"].num_bytes == 4
    assert asked == [(0, len(small))]
    asked.clear()
    names = {f"tensor.{i:06d}": tensor(i, i + 1) for i in range(4000)}
    large = build_file(names, b"x" * 4000)
    assert len(read_header(reader(large), "x", len(large)).entries) == 4000
    assert asked == [(0, FIRST_READ_BYTES), (FIRST_READ_BYTES, 8 + len(json.dumps(names)))]


def test_a_reader_that_gives_too_little_is_an_error_of_the_file(build_file: Build, tensor: Entry) -> None:
    data = build_file({"a": tensor(0, 4)}, b"1234")
    assert "could be read" in refusal(data[:12], file_bytes=len(data)).message
