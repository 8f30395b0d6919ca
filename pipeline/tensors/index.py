"""Which file holds which tensor, proven from the headers themselves.

An index file (``model.safetensors.index.json``) only claims where tensors are. Here its claims are compared with the
headers in both directions, so that afterwards every tensor has exactly one place and no file hides a second copy.
``metadata.total_size`` is not compared: published models are known to carry a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from pipeline.errors import CorruptWeightsError
from pipeline.tensors.header import REFETCH_HINT, ReadRange, TensorEntry, read_header
from pipeline.weights import INDEX_FILE, choose_weights, read_weight_map


@dataclass(frozen=True)
class WeightIndex:
    """Every tensor of a source and where it lies.

    Attributes:
        entries: Tensor name to (file, entry), sorted by name.
        files: The weights files, sorted; paths relative to the source.
        total_bytes: Bytes of all tensors, without headers.
        num_parameters: Elements of all tensors.
        parts: Names of those that are parts of a tensor in a file, and stand for it among the entries.
    """

    entries: Mapping[str, tuple[str, TensorEntry]]
    files: tuple[str, ...]
    total_bytes: int
    num_parameters: int
    parts: frozenset[str] = frozenset()

    def cut(self, parts: Mapping[str, Sequence[str]]) -> WeightIndex:
        """Return the index with some tensors replaced by equal parts of them, which lie one after the other.

        Args:
            parts: By the name of a tensor [..., columns], names for its parts, [rows / parts, columns] each.
        """
        entries = dict(self.entries)
        for whole, names in parts.items():
            file, entry = entries.pop(whole)
            size = entry.num_bytes // len(names)
            shape = (entry.num_elements // entry.shape[-1] // len(names), entry.shape[-1])
            for number, name in enumerate(names):
                start = entry.start_bytes + number * size
                if name in entries:
                    _contradiction(f"{file} holds {name!r} and, in {whole!r}, what is called so too", file)
                entries[name] = (file, TensorEntry(name, entry.dtype, shape, start, start + size))
        found = frozenset(name for names in parts.values() for name in names)
        return replace(self, entries=dict(sorted(entries.items())), parts=self.parts | found)


def read_index(file_sizes: Mapping[str, int], read_range: ReadRange) -> WeightIndex:
    """Return where every tensor of a source lies, with all headers checked.

    Args:
        file_sizes: Sizes in bytes of the source's files by path; files that are no weights may be among them.
        read_range: Reads a byte range of one of them.

    Raises:
        SourceNotFoundError: when there are no safetensors.
        CorruptWeightsError: when a header or the index is damaged or they contradict each other.
    """
    weight_map = read_weight_map(file_sizes, read_range)
    files = choose_weights(file_sizes, weight_map)
    entries: dict[str, tuple[str, TensorEntry]] = {}
    for file in files:
        for name, entry in read_header(read_range, file, file_sizes[file]).entries.items():
            if name in entries:
                _contradiction(f"tensor {name!r} is in both {entries[name][0]} and {file}", file)
            entries[name] = (file, entry)
    if weight_map is not None:
        _require_agreement(weight_map, entries)
    if not entries:
        _contradiction(f"{', '.join(files)} holds no tensor at all", files[0])
    return WeightIndex(
        entries=dict(sorted(entries.items())),
        files=files,
        total_bytes=sum(entry.num_bytes for _, entry in entries.values()),
        num_parameters=sum(entry.num_elements for _, entry in entries.values()),
    )


def _require_agreement(weight_map: Mapping[str, str], entries: Mapping[str, tuple[str, TensorEntry]]) -> None:
    for name, file in weight_map.items():
        if name not in entries:
            _contradiction(f"{INDEX_FILE} says that tensor {name!r:.200} is in {file}, whose header has none", file)
        if entries[name][0] != file:
            actual = entries[name][0]
            _contradiction(f"{INDEX_FILE} says that tensor {name!r:.200} is in {file}, but it is in {actual}", file)
    for name, (file, _) in entries.items():
        if name not in weight_map:
            _contradiction(f"{file} holds tensor {name!r}, which {INDEX_FILE} does not name", file)


def _contradiction(problem: str, file: str) -> NoReturn:
    raise CorruptWeightsError(problem, code="source.index", hint=REFETCH_HINT, context={"file": file})
