"""Which file holds which tensor, proven from the headers themselves.

An index file (``model.safetensors.index.json``) only claims where tensors are. Here its claims are compared with the
headers in both directions, so that afterwards every tensor has exactly one place and no file hides a second copy.
``metadata.total_size`` is not compared: published models are known to carry a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NoReturn

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.tensors.header import REFETCH_HINT, ReadRange, TensorEntry, parse_json_object, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class WeightIndex:
    """Every tensor of a source and where it lies.

    Attributes:
        entries: Tensor name to (file, entry), sorted by name.
        files: The weights files, sorted; paths relative to the source.
        total_bytes: Bytes of all tensors, without headers.
        num_parameters: Elements of all tensors.
    """

    entries: Mapping[str, tuple[str, TensorEntry]]
    files: tuple[str, ...]
    total_bytes: int
    num_parameters: int


def read_index(file_sizes: Mapping[str, int], read_range: ReadRange) -> WeightIndex:
    """Return where every tensor of a source lies, with all headers checked.

    Args:
        file_sizes: Sizes in bytes of the source's files by path; files that are no weights may be among them.
        read_range: Reads a byte range of one of them.

    Raises:
        SourceNotFoundError: when there are no safetensors.
        CorruptWeightsError: when a header or the index is damaged or they contradict each other.
    """
    weight_map = _read_weight_map(file_sizes, read_range) if INDEX_FILE in file_sizes else None
    files = sorted(set(weight_map.values())) if weight_map is not None else [_only_file(file_sizes)]
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
        files=tuple(files),
        total_bytes=sum(entry.num_bytes for _, entry in entries.values()),
        num_parameters=sum(entry.num_elements for _, entry in entries.values()),
    )


def _read_weight_map(file_sizes: Mapping[str, int], read_range: ReadRange) -> dict[str, str]:
    """Return the index's claims: tensor name to file, every file being one of the source's safetensors."""
    size_bytes = file_sizes[INDEX_FILE]
    if size_bytes > MAX_INDEX_BYTES:
        _contradiction(f"{INDEX_FILE} has {size_bytes} bytes; more than {MAX_INDEX_BYTES} is no index", INDEX_FILE)
    try:
        weight_map = parse_json_object(read_range(INDEX_FILE, 0, size_bytes)).get("weight_map")
    except ValueError as error:
        _contradiction(f"{INDEX_FILE} is not a UTF-8 JSON object: {error!s:.200}", INDEX_FILE)
    if not isinstance(weight_map, dict) or not weight_map:
        _contradiction(f"{INDEX_FILE} has no weight_map of tensor names to files", INDEX_FILE)
    for name, file in weight_map.items():
        claim = f"{INDEX_FILE} says that tensor {name!r:.200} is in {file!r:.200}"
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            _contradiction(f"{claim}, which is no safetensors file", INDEX_FILE)
        if file not in file_sizes:
            _contradiction(f"{claim}, which is absent", INDEX_FILE)
    return weight_map


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


def _only_file(file_sizes: Mapping[str, int]) -> str:
    """Return the one weights file of a source without an index."""
    top_level = sorted(path for path in file_sizes if PurePosixPath(path).match("*.safetensors") and "/" not in path)
    if SINGLE_FILE in top_level:
        return SINGLE_FILE
    # consolidated.safetensors is a second copy of the same weights under another naming.
    candidates = [path for path in top_level if path != "consolidated.safetensors"] or top_level
    if not candidates:
        raise SourceNotFoundError(
            "the source has no *.safetensors file at its top level",
            code="source.no_safetensors",
            hint="choose a revision that has safetensors, or re-save the model with save_pretrained",
        )
    if len(candidates) > 1:
        _contradiction(
            f"there are {len(candidates)} safetensors files ({', '.join(candidates[:3])}, ...) and no {INDEX_FILE}",
            INDEX_FILE,
            hint="add the index (save_pretrained writes it), or leave one file in the folder",
        )
    return candidates[0]


def _contradiction(problem: str, file: str, hint: str = REFETCH_HINT) -> NoReturn:
    raise CorruptWeightsError(problem, code="source.index", hint=hint, context={"file": file})
