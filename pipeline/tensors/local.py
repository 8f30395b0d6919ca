"""Weights in a local folder: the index of a model folder, and all tensors of one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pipeline.tensors.dtypes import TORCH_DTYPES
from pipeline.tensors.header import TensorEntry, read_header
from pipeline.tensors.index import WeightIndex, read_index
from pipeline.tensors.reader import FileStamp, digest_tensors, expect_tensors, read_tensors

CHUNK_BYTES = 1 << 24


def read_local_range(folder: Path, path: str, start: int, end: int) -> bytes:
    """Return bytes ``start`` to ``end`` of a file in a folder; fewer when the file is shorter."""
    with (folder / path).open("rb") as handle:
        handle.seek(start)
        return handle.read(end - start)


@dataclass(frozen=True)
class LocalTensors:
    """The tensors of a folder.

    Attributes:
        folder: Where the files are.
        index: Where the tensors are in them.
        stamps: What each weights file must still be when it is read.
    """

    folder: Path
    index: WeightIndex
    stamps: Mapping[str, FileStamp]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors on the CPU; as ``read_tensors``."""
        return read_tensors(self.folder, self.index, names, self.stamps)

    def expect(self, names: Iterable[str]) -> None:
        """Have the system read tensors ahead."""
        expect_tensors(self.folder, self.index, names)

    def digest_tensors(self, file: str) -> tuple[str, dict[str, str]]:
        """Return the SHA-256 of a whole file and of each of its tensors."""
        with (self.folder / file).open("rb") as handle:
            return digest_tensors(self.index, file, iter(lambda: handle.read(CHUNK_BYTES), b""))

    def forget(self, file: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def read_folder_index(folder: Path) -> WeightIndex:
    """Return where every tensor of a model folder lies, with all headers checked.

    Raises:
        SourceNotFoundError: when there are no safetensors.
        CorruptWeightsError: when a header or the index is damaged or they contradict each other.
    """
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return read_index(sizes, lambda path, start, end: read_local_range(folder, path, start, end))


def read_file_tensors(path: Path, select: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file whose names ``select`` accepts, on the CPU; only these are read.

    Raises:
        CorruptWeightsError: when the file is damaged.
    """
    index = read_file_index(path)
    return read_tensors(path.parent, index, [name for name in index.entries if select(name)])


def read_file_rows(path: Path, rows: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return of the named tensors of one safetensors file the rows from a first one to before a last one, on the CPU;
    only these are read. A tensor without dimensions is one row.

    Raises:
        CorruptWeightsError: when the file is damaged.
    """
    index = read_file_index(path)
    entries = {name: (path.name, _rows_entry(index.entries[name][1], *ends)) for name, ends in rows.items()}
    return read_tensors(path.parent, replace(index, entries=entries), rows)


def _rows_entry(entry: TensorEntry, first: int, last: int) -> TensorEntry:
    """Return a tensor's rows as if they were a tensor."""
    if not entry.shape:
        return entry
    row_bytes = entry.num_bytes // max(entry.shape[0], 1)
    start = entry.start_bytes + first * row_bytes
    shape = (last - first, *entry.shape[1:])
    return replace(entry, shape=shape, start_bytes=start, end_bytes=start + (last - first) * row_bytes)


def read_file_index(path: Path) -> WeightIndex:
    """Return where the tensors of one safetensors file lie.

    Raises:
        CorruptWeightsError: when the file is damaged.
    """
    header = read_header(
        lambda name, start, end: read_local_range(path.parent, name, start, end), path.name, path.stat().st_size
    )
    entries = {name: (path.name, entry) for name, entry in header.entries.items()}
    total = sum(entry.num_bytes for entry in header.entries.values())
    count = sum(entry.num_elements for entry in header.entries.values())
    return WeightIndex(entries, (path.name,), total, count)


def copy_problems(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return which of ``tensors`` are not in a safetensors file bit for bit, one line each.

    The file is read a chunk at a time: a large tensor is not in memory twice.

    Raises:
        CorruptWeightsError: when the file is damaged.
    """
    entries = read_file_index(path).entries
    problems = []
    with path.open("rb") as handle:
        for name, tensor in tensors.items():
            if name not in entries:
                problems.append(f"{name} is not in the written file")
                continue
            entry = entries[name][1]
            is_alike = TORCH_DTYPES.get(entry.dtype) is tensor.dtype and tuple(entry.shape) == tuple(tensor.shape)
            handle.seek(entry.start_bytes)
            if not is_alike or not _is_next(handle, tensor):
                problems.append(f"{name} was not copied bit for bit")
    return problems


def _is_next(handle: BinaryIO, tensor: Tensor) -> bool:
    """Return whether what follows in a file is the tensor's memory."""
    expected = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    chunks = (expected[start : start + CHUNK_BYTES] for start in range(0, len(expected), CHUNK_BYTES))
    return all(handle.read(len(chunk)) == chunk for chunk in chunks)
