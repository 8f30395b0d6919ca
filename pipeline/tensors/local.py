"""Weights in a local folder: the index of a model folder, and all tensors of one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.tensors.header import read_header
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
    header = read_header(
        lambda name, start, end: read_local_range(path.parent, name, start, end), path.name, path.stat().st_size
    )
    entries = {name: (path.name, entry) for name, entry in header.entries.items()}
    total = sum(entry.num_bytes for entry in header.entries.values())
    count = sum(entry.num_elements for entry in header.entries.values())
    names = [name for name in entries if select(name)]
    return read_tensors(path.parent, WeightIndex(entries, (path.name,), total, count), names)
