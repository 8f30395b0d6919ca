"""Weights written so that equal tensors and metadata give equal bytes, and a file is there whole or not at all.

The ``safetensors`` package writes the data: tensors sorted by width, then name. It orders the metadata by a hash that
differs between processes, so the JSON is put in order afterwards, in the space that it already takes. It also creates
files for their owner alone and does not sync them; a release is read by other users and must survive a power cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline import disk
from pipeline.errors import CorruptWeightsError
from pipeline.strict_json import parse_json_object
from pipeline.tensors.header import LENGTH_BYTES, parse_header


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Make ``path`` a safetensors file of these tensors; its bytes depend on nothing but them and the metadata.

    The metadata gets ``format: pt`` unless it says otherwise, as loaders demand. Tensors on other devices are copied,
    tensors that share memory are written separately. A crash leaves the old file or none, and perhaps a hidden
    ``.<name>.*.tmp`` beside it; a rerun writes the same bytes.

    Raises:
        DiskFullError: naming the path and the bytes needed.
        StorageError: when it cannot be written for another reason.
    """
    plain = _separate(tensors)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    with _write_errors(path, num_bytes), disk.replacing(path) as temporary:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        save_file(plain, temporary, metadata={"format": "pt", **metadata})
        _order_header(temporary)
        temporary.chmod(mode)


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Make ``path`` the index that says which file holds which tensor; deterministic and atomic as the weights.

    Args:
        path: Where to write, by convention ``model.safetensors.index.json``.
        weight_map: Tensor name to file name.
        total_size: Bytes of all tensors, without headers.

    Raises:
        DiskFullError: naming the path and the bytes needed.
        StorageError: when it cannot be written for another reason.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    data = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    with _write_errors(path, len(data)):
        disk.save_file(path, (data,))


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors sorted by name, on the CPU, contiguous, no two in the same memory."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return plain


def _order_header(path: Path) -> None:
    """Rewrite the JSON of a file's header with sorted metadata, without moving the data.

    Reordering keys keeps the length, and both writers escape alike, so the new text always fits where the old was.
    """
    size_bytes = path.stat().st_size
    with path.open("r+b") as handle:
        length = int.from_bytes(handle.read(LENGTH_BYTES), "little")
        old = handle.read(length)
        fields = parse_json_object(old)
        ordered = {"__metadata__": dict(sorted(fields.pop("__metadata__").items())), **fields}
        new = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode("utf-8").ljust(length)
        # Proves that the whole file is there: the package's buffered writer may lose an error of its last write.
        parse_header(length.to_bytes(LENGTH_BYTES, "little") + new, size_bytes, str(path))
        handle.seek(LENGTH_BYTES)
        handle.write(new)


@contextmanager
def _write_errors(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn a failure of the block to write ``num_bytes`` to ``path`` into a StorageError."""
    try:
        yield
    except (OSError, SafetensorError, CorruptWeightsError) as error:
        cause = error if isinstance(error, OSError) else _system_error(error)
        raise disk.write_error(
            cause, path, num_bytes, elsewhere="choose another folder", check="check the folder and its permissions"
        ) from error


def _system_error(error: Exception) -> OSError:
    """Return the system's error inside one of the package, which reports it as text only."""
    match = re.search(r"os error (\d+)", str(error))
    return OSError(int(match[1]) if match else 0, str(error))
