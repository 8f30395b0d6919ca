"""Tensors on their way from one worker to another, a few rows at a time.

What is handed over is there several times: with its holder, who may have to read it back from disk first, in shared
memory, and with whoever asked. In parts only one of these is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PART_BYTES = 16_000_000
"""Most bytes of a part, as far as rows are not longer: the time of a request does not count beside that of a copy."""

RowRange = tuple[int, int]
"""First row of a tensor, and the row after the last. A tensor without dimensions is one row."""


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor.

    Attributes:
        name: Its name.
        dtype: Its dtype.
        shape: Its shape, with all rows.
        rows: Which these are.
        data: Their bytes, a uint8 array [bytes].
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: RowRange
    data: Any


@dataclass(frozen=True)
class Part:
    """Some rows of some of an output's tensors.

    Attributes:
        rows: The rows.
        num_parts: Parts of the output.
    """

    rows: tuple[Rows, ...]
    num_parts: int


def cut_rows(outlines: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, RowRange]]:
    """Return which rows of which tensors are in each part; of no tensors there is one part, which is empty.

    Args:
        outlines: Tensors of these shapes and dtypes by name; their content does not count.
        max_bytes: Most bytes of a part that has more than one row.
    """
    parts: list[dict[str, RowRange]] = [{}]
    left = max_bytes
    for name, tensor in outlines.items():
        num_rows = _num_rows(tensor.shape)
        row_bytes = tensor.nbytes // max(num_rows, 1)
        first = 0
        while True:
            # A row that is larger than a part may be leaves less than nothing of it.
            last = min(num_rows, first + max(left, 0) // max(row_bytes, 1))
            if last == first < num_rows and not parts[-1]:
                last = first + 1
            if last > first or not num_rows:
                parts[-1][name] = (first, last)
                left -= (last - first) * row_bytes
            if last == num_rows:
                break
            parts.append({})
            first, left = last, max_bytes
    return parts


def make_part(
    outlines: Mapping[str, Tensor], found: Mapping[str, Tensor], ranges: Mapping[str, RowRange], num_parts: int
) -> Part:
    """Return a part.

    Args:
        outlines: Tensors of the whole tensors' shapes and dtypes by name.
        found: The rows of this part by the same names, in CPU memory.
        ranges: Which rows these are.
        num_parts: Parts of the output.
    """
    return Part(
        tuple(
            Rows(name, tensor.dtype, tuple(outlines[name].shape), ranges[name], _bytes_of(tensor.contiguous()).numpy())
            for name, tensor in found.items()
        ),
        num_parts,
    )


def take_rows(tensor: Tensor, rows: RowRange) -> Tensor:
    """Return rows of a tensor, which share its memory."""
    return tensor[rows[0] : rows[1]] if tensor.dim() else tensor


def join_parts(ask: Callable[[int], Part]) -> dict[str, Tensor]:
    """Return an output's tensors, in CPU memory of their own.

    Args:
        ask: Gives the part with a number. None is held when the next one is asked for.
    """
    whole: dict[str, Tensor] = {}
    number, num_parts = 0, 1
    while number < num_parts:
        number, num_parts = number + 1, _take_in(ask(number), whole)
    return whole


def _take_in(part: Part, whole: dict[str, Tensor]) -> int:
    """Copy a part to where the whole is, and return how many parts there are."""
    for rows in part.rows:
        if rows.name not in whole:
            whole[rows.name] = torch.empty(rows.shape, dtype=rows.dtype)
        _bytes_of(take_rows(whole[rows.name], rows.rows)).numpy()[...] = rows.data
    return part.num_parts


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)


def _num_rows(shape: torch.Size) -> int:
    return shape[0] if shape else 1
