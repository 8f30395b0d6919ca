"""Which files of a model hold its weights: one rule for folders and repositories, for plans and conversions.

Weights are the safetensors files beside config.json that the index names; without an index ``model.safetensors``, else
the only one. ``consolidated.safetensors`` is a second copy of the same weights under another naming, so it counts only
where there is nothing else. A file in a subfolder never counts: engines look for weights beside the config.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NoReturn

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.strict_json import parse_json_object

INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000

_SINGLE_FILE = "model.safetensors"
_SECOND_COPY = "consolidated.safetensors"


def top_level_safetensors(paths: Collection[str]) -> list[str]:
    """Return the safetensors files that could hold weights, sorted."""
    return sorted(path for path in paths if path.endswith(".safetensors") and "/" not in path)


def read_weight_map(
    file_sizes: Mapping[str, int], read_range: Callable[[str, int, int], bytes], where: str = ""
) -> dict[str, str] | None:
    """Return what the index claims, tensor name to file, each file being one of the model's; None without an index.

    Args:
        file_sizes: Sizes in bytes of the model's files by path; files that are no weights may be among them.
        read_range: Returns the bytes ``[start, end)`` of one of them: ``read_range(path, start, end)``.
        where: The model's name, for messages.

    Raises:
        CorruptWeightsError: when the index cannot be read or names a file that cannot hold weights.
    """
    if INDEX_FILE not in file_sizes:
        return None
    size_bytes = file_sizes[INDEX_FILE]
    if size_bytes > MAX_INDEX_BYTES:
        _bad_index(f"has {size_bytes} bytes; more than {MAX_INDEX_BYTES} is no index", where)
    try:
        weight_map = parse_json_object(read_range(INDEX_FILE, 0, size_bytes)).get("weight_map")
    except ValueError as error:
        _bad_index(f"is not a UTF-8 JSON object: {error!s:.200}", where)
    if not isinstance(weight_map, dict) or not weight_map:
        _bad_index("has no weight_map of tensor names to files", where)
    for name, file in weight_map.items():
        claim = f"says that tensor {name!r:.200} is in {file!r:.200}"
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            _bad_index(f"{claim}, which is no safetensors file", where)
        if "/" in file:
            _bad_index(f"{claim}, which is not beside config.json", where)
        if file not in file_sizes:
            _bad_index(f"{claim}, which is absent", where)
    return weight_map


def choose_weights(paths: Collection[str], weight_map: Mapping[str, str] | None, where: str = "") -> tuple[str, ...]:
    """Return the files that hold the weights, sorted.

    Args:
        paths: All files of the model.
        weight_map: What ``read_weight_map`` gave.
        where: The model's name, for messages.

    Raises:
        SourceNotFoundError: when there are none.
        CorruptWeightsError: when there are several and no index says which belong together.
    """
    if weight_map is not None:
        return tuple(sorted(set(weight_map.values())))
    top_level = top_level_safetensors(paths)
    if _SINGLE_FILE in top_level:
        return (_SINGLE_FILE,)
    candidates = [path for path in top_level if path != _SECOND_COPY] or top_level
    subject = where or "the source"
    if not candidates:
        raise SourceNotFoundError(
            f"{subject} has no *.safetensors file at its top level",
            code="source.no_safetensors",
            hint="choose a revision that has safetensors, or re-save the model with save_pretrained",
        )
    if len(candidates) > 1:
        raise CorruptWeightsError(
            f"{subject}: there are {len(candidates)} safetensors files ({', '.join(candidates[:3])}"
            f"{', ...' if len(candidates) > 3 else ''}) and no {INDEX_FILE}",
            code="source.index",
            hint="add the index (save_pretrained writes it), or leave one file in the folder",
        )
    return tuple(candidates)


def _bad_index(problem: str, where: str) -> NoReturn:
    raise CorruptWeightsError(
        f"{where}: {INDEX_FILE} {problem}" if where else f"{INDEX_FILE} {problem}",
        code="source.index",
        hint="fetch the source again; if it stays the same, its publisher has to repair the index",
        context={"file": INDEX_FILE},
    )
