"""The index is believed only where the headers say the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import CorruptWeightsError, PipelineError, SourceNotFoundError
from pipeline.tensors.index import WeightIndex, read_index
from pipeline.weights import INDEX_FILE

Reader = Callable[[str, int, int], bytes]

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(folder: Path, files: Mapping[str, list[str]]) -> None:
    for file, names in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.ones(2, 3) for name in names}, folder / file)


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def read(folder: Path, reader: Reader) -> WeightIndex:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return read_index(sizes, reader)


def test_one_file_needs_no_index(tmp_path: Path, folder_reader: Reader) -> None:
    weights(tmp_path, {"model.safetensors": ["b", "a"], "adapter_model.safetensors": ["lora"]})
    found = read(tmp_path, folder_reader)
    assert (list(found.entries), found.files, found.total_bytes, found.num_parameters) == (
        ["a", "b"],
        ("model.safetensors",),
        48,
        12,
    )


def test_an_indexed_source_is_read_over_its_files(tmp_path: Path, folder_reader: Reader) -> None:
    weights(tmp_path, {A: ["x"], B: ["y"], "consolidated.safetensors": ["x", "y"], "model.safetensors": ["old"]})
    index(tmp_path, {"y": B, "x": A})
    found = read(tmp_path, folder_reader)
    assert {name: file for name, (file, _) in found.entries.items()} == {"x": A, "y": B}
    assert found.files == (A, B)


@pytest.mark.parametrize("names", [["weights.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"]])
def test_the_only_other_file_is_taken(tmp_path: Path, folder_reader: Reader, names: list[str]) -> None:
    weights(tmp_path, {name: ["a"] for name in names})
    assert read(tmp_path, folder_reader).files == (names[0],)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"x": A, "y": B, "z": "model-00003.safetensors"}, "in 'model-00003.safetensors', which is absent"),
        ({"x": A, "y": B, "z": B}, f"tensor 'z' is in {B}, whose header has none"),
        ({"x": B, "y": A}, f"tensor 'x' is in {B}, but it is in {A}"),
        ({"x": A, "y": f"sub/{B}"}, f"in 'sub/{B}', which is not beside"),
        ({"x": A, "y": "pytorch_model.bin"}, "which is no safetensors file"),
        ({"x": A, "y": 3}, "which is no safetensors file"),
        ({}, "has no weight_map"),
        ([A], "has no weight_map"),
    ],
)
def test_a_contradicting_index_is_refused(
    tmp_path: Path, folder_reader: Reader, weight_map: object, reason: str
) -> None:
    weights(tmp_path, {A: ["x"], B: ["y"], f"sub/{B}": ["y"]})
    index(tmp_path, weight_map)
    with pytest.raises(CorruptWeightsError) as caught:
        read(tmp_path, folder_reader)
    assert reason in caught.value.message
    assert INDEX_FILE in caught.value.message


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path, folder_reader: Reader) -> None:
    weights(tmp_path, {A: ["x", "hidden"], B: ["y"]})
    index(tmp_path, {"x": A, "y": B})
    with pytest.raises(CorruptWeightsError, match="holds tensor 'hidden', which"):
        read(tmp_path, folder_reader)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path, folder_reader: Reader) -> None:
    weights(tmp_path, {A: ["x"], B: ["x", "y"]})
    index(tmp_path, {"x": A, "y": B})
    with pytest.raises(CorruptWeightsError, match=f"tensor 'x' is in both {A} and {B}"):
        read(tmp_path, folder_reader)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"weight_map": {"x": "a", "x": "b"}}'])
def test_an_unreadable_index_is_refused(tmp_path: Path, folder_reader: Reader, text: bytes) -> None:
    weights(tmp_path, {A: ["x"]})
    (tmp_path / INDEX_FILE).write_bytes(text)
    with pytest.raises(CorruptWeightsError, match="not a UTF-8 JSON object"):
        read(tmp_path, folder_reader)


@pytest.mark.parametrize(
    ("files", "error", "reason"),
    [
        ({}, SourceNotFoundError, "no *.safetensors file"),
        ({"original/model.safetensors": ["a"]}, SourceNotFoundError, "no *.safetensors file"),
        ({"a.safetensors": ["a"], "b.safetensors": ["b"]}, CorruptWeightsError, "2 safetensors files"),
        ({"model.safetensors": []}, CorruptWeightsError, "holds no tensor at all"),
    ],
)
def test_weights_that_cannot_be_chosen_are_an_error(
    tmp_path: Path, folder_reader: Reader, files: dict[str, list[str]], error: type[PipelineError], reason: str
) -> None:
    weights(tmp_path, files)
    with pytest.raises(error) as caught:
        read(tmp_path, folder_reader)
    assert reason in caught.value.message
    assert caught.value.hint
