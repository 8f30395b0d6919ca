"""The header of a safetensors file, checked before any tensor in it is trusted.

A file is ``N`` (uint64, little-endian), ``N`` bytes of a JSON object, then the data. Each key of the object is a
tensor name with ``dtype``, ``shape`` and ``data_offsets`` (relative to the data), except ``__metadata__``, a mapping of
text to text. Here a header is accepted only when the tensors tile the data exactly: no hole, no overlap, nothing
missing and nothing left over, every length following from dtype and shape. That is what the format promises, and it
turns a truncated, padded or forged file into an error before a byte of it is read as weights.

Cost: time and memory are linear in the header, which is at most ``MAX_HEADER_BYTES`` and never more than the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline.errors import CorruptWeightsError
from pipeline.strict_json import DuplicateKeyError, parse_json_object
from pipeline.tensors.dtypes import ITEM_BITS

ReadRange = Callable[[str, int, int], bytes]
"""Returns the bytes ``[start, end)`` of the file at a path: ``read_range(path, start, end)``."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_SIZE = 2**63 - 1
"""The largest size of a dimension: sizes are signed 64-bit integers everywhere."""

FIRST_READ_BYTES = 128 * 1024
"""One read of this size holds the whole header of most files, which saves a request on a hub."""

REFETCH_HINT = "fetch the file again; if it stays the same, its publisher has to write it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file.

    Attributes:
        name: Name of the tensor.
        dtype: Element type as the format names it, for example ``"BF16"``.
        shape: Sizes, outermost first; row-major layout.
        start_bytes: Absolute offset in the file of its first byte.
        end_bytes: Absolute offset in the file after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start_bytes: int
    end_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.end_bytes - self.start_bytes


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header.

    Attributes:
        entries: The tensors by name, in the order of their data.
        metadata: The free text that the writer put beside them.
        header_bytes: Offset in the file at which data starts (length field and JSON).
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    header_bytes: int


def read_header(read_range: ReadRange, path: str, file_bytes: int) -> SafetensorsHeader:
    """Return the checked header of the file at ``path``, read in one or two ranges.

    Raises:
        CorruptWeightsError: as ``parse_header``.
    """
    first = read_range(path, 0, min(file_bytes, FIRST_READ_BYTES))
    needed = header_end(first, file_bytes, path)
    if needed > len(first):
        first += read_range(path, len(first), needed)
    return parse_header(first, file_bytes, path)


def header_end(prefix: bytes, file_bytes: int, where: str) -> int:
    """Return the offset at which data starts, from the first 8 bytes of a file.

    Raises:
        CorruptWeightsError: when the file is shorter than that or the length is beyond the format's limit.
    """
    if file_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        available = min(file_bytes, len(prefix))
        _damaged(where, f"it is truncated: {available} bytes cannot hold the 8-byte length of the header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        _damaged(where, f"its header claims {length} bytes, above the format's limit of {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        _damaged(where, f"it is truncated: its header claims {length} bytes, the whole file has {file_bytes}")
    return LENGTH_BYTES + length


def parse_header(prefix: bytes, file_bytes: int, where: str) -> SafetensorsHeader:
    """Return the checked header of a file of ``file_bytes`` that starts with ``prefix``.

    Args:
        prefix: The first bytes of the file, at least the whole header; more is ignored.
        file_bytes: Size of the whole file.
        where: The file's name, for messages.

    Raises:
        CorruptWeightsError: naming the file, the tensor and what is wrong. No other exception, whatever the bytes.
    """
    data_start = header_end(prefix, file_bytes, where)
    if len(prefix) < data_start:
        _damaged(where, f"only {len(prefix)} of the {data_start} bytes of its header could be read")
    fields = _parse_json(prefix[LENGTH_BYTES:data_start], where)
    metadata = _metadata(fields.pop("__metadata__", None), where)
    entries = [_entry(name, value, data_start, file_bytes, where) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.start_bytes, entry.end_bytes))
    _require_tiling(entries, data_start, file_bytes, where)
    return SafetensorsHeader({entry.name: entry for entry in entries}, metadata, data_start)


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    if not data.startswith(b"{"):
        _damaged(where, "its header does not start with '{'; this is not a safetensors file")
    try:
        return parse_json_object(data)
    except DuplicateKeyError as error:
        _damaged(where, str(error))
    except ValueError as error:
        _damaged(where, f"its header is not a UTF-8 JSON object: {error!s:.200}")


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _damaged(where, "its __metadata__ is not a mapping of text to text")
    return value


def _entry(name: str, value: Any, data_start: int, file_bytes: int, where: str) -> TensorEntry:
    """Return the entry of one tensor, with everything checked that does not depend on the others."""
    if not name or not name.isprintable():
        # Also keeps out lone surrogates, which no terminal and no file could be told about.
        _damaged(where, f"the tensor name {name!a:.200} is empty or not printable")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        _damaged(where, "it needs dtype, shape and data_offsets", name)
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        _damaged(where, f"dtype {dtype!r:.60} is unknown; the format has {', '.join(ITEM_BITS)}", name)
    if not _is_sizes(shape):
        _damaged(where, f"shape {shape!r:.200} is not a list of non-negative integers", name)
    if max(shape, default=0) > MAX_SIZE:
        # Beside a zero it would fit any data, and no library could hold the tensor.
        _damaged(where, f"shape {shape!r:.200} has a size that no tensor can have", name)
    start, end = _offsets(value["data_offsets"], file_bytes - data_start, where, name)
    expected_bits = _product(shape, limit=8 * file_bytes) * ITEM_BITS[dtype]
    if expected_bits != 8 * (end - start):
        claim = f"shape {shape!r:.200} of {dtype} does not take the {end - start} bytes that data_offsets span"
        _damaged(where, claim, name)
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)


def _offsets(value: Any, data_bytes: int, where: str, name: str) -> tuple[int, int]:
    if not _is_sizes(value) or len(value) != 2:
        _damaged(where, f"data_offsets {value!r:.200} are not two non-negative integers", name)
    start, end = value
    if start > end:
        _damaged(where, f"data_offsets {value!r:.120} run backwards", name)
    if end > data_bytes:
        reach = f"its data ends at byte {end!r:.60} of the data section, which has {data_bytes}"
        _damaged(where, f"{reach}: the file is truncated or its header lies", name)
    return start, end


def _is_sizes(value: Any) -> bool:
    # bool is an int to Python and `true` is no size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _product(shape: list[int], limit: int) -> int:
    """Return the product, or some number above ``limit`` once it is above: forged sizes must not cost time."""
    if 0 in shape:
        return 0
    product = 1
    for size in shape:
        product *= size
        if product > limit:
            return limit + 1
    return product


def _require_tiling(entries: list[TensorEntry], data_start: int, file_bytes: int, where: str) -> None:
    """Require that the entries, sorted by their offsets, cover the data without hole, overlap or rest."""
    position, before = data_start, "the header"
    for entry in entries:
        if entry.start_bytes < position:
            _damaged(where, f"its data overlaps that of {before}", entry.name)
        if entry.start_bytes > position:
            gap = entry.start_bytes - position
            _damaged(where, f"{gap} bytes between {before} and it belong to nothing", entry.name)
        position, before = entry.end_bytes, f"tensor {entry.name!r:.200}"
    if position != file_bytes:
        _damaged(where, f"{file_bytes - position} bytes after {before} belong to no tensor")


def _damaged(where: str, problem: str, tensor: str | None = None) -> NoReturn:
    subject = where if tensor is None else f"{where}: tensor {tensor!r:.200}"
    context = {"file": where} if tensor is None else {"file": where, "tensor": tensor}
    raise CorruptWeightsError(f"{subject}: {problem}", code="source.header", hint=REFETCH_HINT, context=context)
