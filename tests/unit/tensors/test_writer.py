"""Written weights: the same bytes always, whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import DiskFullError, StorageError
from pipeline.tensors import writer
from pipeline.tensors.writer import write_index, write_safetensors
from tests.small_disk import small_disk

SCRIPT = """
import hashlib, sys, torch
from pathlib import Path
from pipeline.tensors.writer import write_safetensors
metadata = {key: key.upper() for key in sys.argv[2].split(",")}
tensors = {name: torch.arange(6).to(torch.bfloat16) for name in sys.argv[3].split(",")}
write_safetensors(Path(sys.argv[1]), tensors, metadata)
"""


def test_bytes_depend_on_neither_process_nor_order(tmp_path: Path) -> None:
    digests = set()
    for i, (keys, names) in enumerate([("a,b,c,d,e,f", "x,y,z"), ("f,e,d,c,b,a", "z,x,y")]):
        path = tmp_path / f"{i}.safetensors"
        subprocess.run([sys.executable, "-c", SCRIPT, str(path), keys, names], check=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", **{key: key.upper() for key in "abcdef"}}


def test_metadata_that_json_escapes_survives(tmp_path: Path) -> None:
    metadata = {"quote": 'a"b\\c/d', "control": "\n\t\x01\x1f\x7f", "wide": "Größe 模型 \u2028 🙂", "format": "np"}
    write_safetensors(tmp_path / "x.safetensors", {"ä": torch.ones(1)}, metadata)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == metadata
        assert list(opened.keys()) == ["ä"]


def test_views_of_one_memory_are_written_separately(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "row": base[1], "turned": base.T, "again": base}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    back = load_file(tmp_path / "x.safetensors")
    assert {name: back[name].tolist() for name in back} == {name: value.tolist() for name, value in tensors.items()}


def test_the_file_is_readable_by_others_and_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_keeps_the_old_file_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(writer, "save_file", fail)
    with pytest.raises(DiskFullError) as caught:
        write_safetensors(path, {"a": torch.ones(1000)}, {})
    assert str(path) in caught.value.message
    assert "4 kB" in caught.value.message
    assert caught.value.context["needed_bytes"] == 4000
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("x.safetensors", b"old")]


def test_a_real_full_disk_is_reported(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as disk:
        with pytest.raises(DiskFullError, match="no space left; 4 MB more are needed"):
            write_safetensors(disk / "x.safetensors", {"a": torch.ones(1_000_000)}, {})
        assert list(disk.iterdir()) == []


def test_a_file_that_came_out_short_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def lossy(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, path.stat().st_size - 1)

    monkeypatch.setattr(writer, "save_file", lossy)
    with pytest.raises(StorageError, match="truncated"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(10)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        write_safetensors(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(1)}, {})


def test_the_index_is_sorted_and_stable(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    write_index(path, {"b": "2.safetensors", "a": "1.safetensors"}, 10)
    first = path.read_bytes()
    write_index(path, {"a": "1.safetensors", "b": "2.safetensors"}, 10)
    assert path.read_bytes() == first
    assert list(json.loads(first)["weight_map"].items()) == [("a", "1.safetensors"), ("b", "2.safetensors")]
    assert json.loads(first)["metadata"] == {"total_size": 10}
