"""Tensors read from local files by byte range: one block at a time, never a whole file.

Reads go through ``pread`` into memory that torch allocated. A memory map would tie every tensor to the file (a file
replaced under it is a crash, not an error) and its pages would not count as this process's memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.finite import is_finite
from pipeline.tensors.dtypes import TORCH_DTYPES
from pipeline.tensors.header import REFETCH_HINT, TensorEntry
from pipeline.tensors.index import WeightIndex

MAX_READ_BYTES = 1 << 30
"""Linux moves at most 2 GiB - 4 KiB in one call."""

FINITE_CHUNK_ELEMENTS = 1 << 22
"""Elements looked at together by ``check_finite``: its own memory stays below 64 MB whatever the tensor."""


class FileStamp(NamedTuple):
    """What tells a file from the same file after it was written to."""

    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Return the stamp of a file by its status."""
        return cls(status.st_size, status.st_mtime_ns)


def read_tensors(
    folder: Path, index: WeightIndex, names: Iterable[str], stamps: Mapping[str, FileStamp] | None = None
) -> dict[str, Tensor]:
    """Return the named tensors on the CPU, in the order of ``names``, in fresh memory of their own.

    Reads exactly their byte ranges. Shapes and dtypes are those of the headers; the layout is contiguous.

    Args:
        folder: Where the files are.
        index: Where the tensors are in them.
        names: What to read.
        stamps: What each file must still be after it was read; files that are not named may have changed.

    Raises:
        SourceNotFoundError: when a file is not there any more or cannot be read.
        CorruptWeightsError: when the index has no such tensor, torch has no such dtype, a file has changed or become
            shorter, or a bool is neither 0 nor 1.
    """
    places = {name: place_of(index, name) for name in names}
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for file, _ in places.values()}):
        wanted = [entry for owner, entry in places.values() if owner == file]
        try:
            descriptor = os.open(folder / file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for entry in sorted(wanted, key=lambda entry: entry.start_bytes):
                    tensors[entry.name] = _read(descriptor, folder / file, entry)
                if stamps is not None and file in stamps:
                    _require_unchanged(folder / file, FileStamp.of(os.fstat(descriptor)), stamps[file])
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            missing = f"{folder / file} is not there any more"
            raise SourceNotFoundError(missing, hint="run the command again to fetch it") from error
        except OSError as error:
            raise SourceNotFoundError(
                f"{folder / file} cannot be read: {error.strerror}",
                code="source.unreadable",
                hint="check its permissions and the disk, then run the command again",
            ) from error
    return {name: tensors[name] for name in places}


def expect_tensors(folder: Path, index: WeightIndex, names: Iterable[str]) -> None:
    """Tell the system that tensors will be read soon, so that it reads them ahead; a file that is gone is passed over,
    as whoever reads it will say so."""
    places = [place_of(index, name) for name in names]
    for file in sorted({file for file, _ in places}):
        try:
            descriptor = os.open(folder / file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            for owner, entry in places:
                if owner == file:
                    os.posix_fadvise(descriptor, entry.start_bytes, entry.num_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def digest_tensors(index: WeightIndex, file: str, chunks: Iterable[bytes]) -> tuple[str, dict[str, str]]:
    """Return the SHA-256 of a whole file and of each of its tensors, in one pass.

    Args:
        index: Where the tensors are.
        file: Which file.
        chunks: Its content, from its beginning to its end.
    """
    whole = hashlib.sha256()
    hashers = {entry.name: (entry, hashlib.sha256()) for owner, entry in index.entries.values() if owner == file}
    position = 0
    for chunk in chunks:
        whole.update(chunk)
        view = memoryview(chunk)
        for entry, hasher in hashers.values():
            hasher.update(view[max(entry.start_bytes - position, 0) : max(entry.end_bytes - position, 0)])
        position += len(chunk)
    return whole.hexdigest(), {name: hasher.hexdigest() for name, (_, hasher) in hashers.items()}


def check_finite(name: str, tensor: Tensor) -> None:
    """Require that no element is NaN or infinite; integers and bools always pass.

    Raises:
        CorruptWeightsError: naming the tensor, the counts and the first position.
    """
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return
    # Most float8 types have no isnan of their own; float32 holds every one of their values.
    widen = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    flat = tensor.detach().reshape(-1)
    num_nan = num_inf = 0
    first = -1
    for start in range(0, flat.numel(), FINITE_CHUNK_ELEMENTS):
        chunk = flat[start : start + FINITE_CHUNK_ELEMENTS]
        chunk = chunk.to(torch.float32) if widen else chunk
        if is_finite(chunk):
            continue
        bad = ~torch.isfinite(chunk)
        num_nan += int(torch.isnan(chunk).sum())
        num_inf += int(torch.isinf(chunk).sum())
        if first < 0:
            first = start + int(bad.nonzero()[0, 0])
    if first < 0:
        return
    position = [int(axis) for axis in torch.unravel_index(torch.tensor(first), tensor.shape)]
    raise CorruptWeightsError(
        f"tensor {name!r} has {num_nan} NaN and {num_inf} infinite of {flat.numel()} values, the first at {position}",
        code="source.not_finite",
        hint="compare the file's digest with the publisher's; a model with such weights cannot be converted",
        context={"tensor": name, "num_nan": num_nan, "num_inf": num_inf, "first": position},
    )


def _require_unchanged(path: Path, now: FileStamp, expected: FileStamp) -> None:
    if now != expected:
        raise CorruptWeightsError(
            f"{path} was written to while it was being converted",
            code="source.changed",
            hint="run the same command again when nothing writes to the source",
        )


def place_of(index: WeightIndex, name: str) -> tuple[str, TensorEntry]:
    """Return the file that holds a tensor, and where it lies in it.

    Raises:
        CorruptWeightsError: when the index has no such tensor.
    """
    if name not in index.entries:
        absent = f"tensor {name!r} is in none of {', '.join(index.files)}"
        raise CorruptWeightsError(absent, code="source.tensor_missing", hint=REFETCH_HINT, context={"tensor": name})
    return index.entries[name]


def make_tensor(where: str | Path, entry: TensorEntry, fill: Callable[[memoryview], None]) -> Tensor:
    """Return one tensor whose bytes ``fill`` puts into the memory that it is given, all of them.

    Raises:
        CorruptWeightsError: when torch has no such dtype, or a bool is neither 0 nor 1.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise CorruptWeightsError(
            f"{where}: tensor {entry.name!r} has dtype {entry.dtype}, which torch cannot hold",
            code="source.dtype",
            hint="choose a revision of the model in 8 bits or more",
        )
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8)
    fill(raw.numpy().data)
    dtype = TORCH_DTYPES[entry.dtype]
    if dtype is torch.bool and raw.numel() and int(raw.max()) > 1:
        nonsense = f"tensor {entry.name!r} is BOOL and has values other than 0 and 1"
        raise CorruptWeightsError(f"{where}: {nonsense}", code="source.dtype", hint=REFETCH_HINT)
    return raw.view(dtype).reshape(entry.shape)


def _read(descriptor: int, path: Path, entry: TensorEntry) -> Tensor:
    """Return one tensor from an open file."""

    def fill(view: memoryview) -> None:
        done = 0
        while done < entry.num_bytes:
            count = os.preadv(descriptor, [view[done : done + MAX_READ_BYTES]], entry.start_bytes + done)
            if count == 0:
                short = f"it ends {entry.num_bytes - done} bytes before tensor {entry.name!r} does"
                raise CorruptWeightsError(f"{path}: {short}", code="source.truncated", hint=REFETCH_HINT)
            done += count

    return make_tensor(path, entry, fill)
