"""What units cost: floating-point operations and bytes, and from these the seconds on one worker.

Formulas, for a linear [r, n] and T tokens: forward 2 r n T; second moment 2 n^2 T; factorization n^3 / 3 in float64;
column updates and scale search r n^2 and some forty passes over r n.

Rates were fitted to a conversion of the 135 M parameter model on 2 cores (AVX-512), torch 2.13.0, one thread a worker,
2026-11-24: seconds = overhead + work / rate for each kind. They set the order of magnitude of a plan before anything
has run; a run learns its own pace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.quantize.solve import TILE_ROWS, TILE_ROWS_DEVICE

FORWARD_FLOPS = 85e9
"""float32 FLOP/s of forward passes and of second moments (matrix products of a few thousand rows)."""

SOLVE_FLOPS = 9e9
"""float32 FLOP/s of column updates, in r n^2 counted twice."""

GRID_VALUES = 55e6
"""Weights a second that the grid of a linear is searched for."""

FACTOR_FLOPS = 25e9
"""float64 FLOP/s of a Cholesky factorization."""

BYTES = 0.8e9
"""Bytes a second that are read, written, hashed and flushed."""

UNIT_S = 0.02
"""Fixed seconds of a unit: reading headers, placing modules, the record."""


@dataclass(frozen=True)
class GroupShape:
    """A linear group as far as it costs anything.

    Attributes:
        rows: out_features of all members.
        width: in_features.
    """

    rows: int
    width: int


def forward_flops(parameters: float, tokens: float) -> float:
    """Return the operations of a forward pass."""
    return 2.0 * parameters * tokens


def moment_flops(groups: Iterable[GroupShape], tokens: float) -> float:
    """Return the operations of second moments."""
    return sum(2.0 * tokens * group.width**2 for group in groups)


def solve_flops(group: GroupShape) -> float:
    """Return the operations of solving a group's columns."""
    return 2.0 * group.rows * group.width**2


def factor_flops(group: GroupShape) -> float:
    """Return the operations of a factorization."""
    return group.width**3 / 3


def scale_flops(group: GroupShape) -> float:
    """Return the operations of a search for activation-aware scales: a dozen losses on a sample of the rows, two on
    all."""
    return 15 * 2.0 * min(group.rows, 512) * group.width**2 + 4.0 * group.rows * group.width**2


def forward_s(parameters: float, tokens: float, groups: Iterable[GroupShape] = ()) -> float:
    """Return the seconds of one block over tokens, with the second moments of ``groups``."""
    return UNIT_S + (forward_flops(parameters, tokens) + moment_flops(groups, tokens)) / FORWARD_FLOPS


def merge_s(group: GroupShape, num_spans: int) -> float:
    """Return the seconds of adding a group's sums and storing the result."""
    return UNIT_S + 4.0 * group.width**2 * (num_spans + 2) / BYTES


def factor_s(group: GroupShape) -> float:
    """Return the seconds of a factorization."""
    return UNIT_S + factor_flops(group) / FACTOR_FLOPS


def scales_s(group: GroupShape) -> float:
    """Return the seconds of a search for activation-aware scales."""
    sample = min(group.rows, 512)
    return UNIT_S + scale_flops(group) / FORWARD_FLOPS + (15 * sample + 40 * group.rows) * group.width / 1e9


def solve_s(group: GroupShape, is_gptq: bool) -> float:
    """Return the seconds of solving a group's rows."""
    columns = solve_flops(group) / SOLVE_FLOPS if is_gptq else solve_flops(group) / FORWARD_FLOPS
    return UNIT_S + columns + group.rows * group.width / GRID_VALUES


def pack_s(parameters: float) -> float:
    """Return the seconds of packing a block and proving the file."""
    return UNIT_S + 4.0 * parameters / BYTES


def generate_s(parameters: float, num_prompts: int, num_tokens: int) -> float:
    """Return the seconds of continuing prompts greedily; a token is bound by reading the weights."""
    return UNIT_S + 4.0 * parameters / BYTES + 4.0 * parameters * num_prompts * num_tokens / 8e9


def copy_s(num_bytes: float) -> float:
    """Return the seconds of copying tensors."""
    return UNIT_S + 2 * num_bytes / BYTES


def row_ranges(group: GroupShape, is_gptq: bool, longest_s: float, device: str) -> list[tuple[int, int]]:
    """Return a group's rows cut into ranges of whole tiles that take at most ``longest_s`` each, where tiles allow."""
    tile = TILE_ROWS.get(device, TILE_ROWS_DEVICE)
    num_tiles = -(-group.rows // tile)
    parts = min(num_tiles, max(1, math.ceil(solve_s(group, is_gptq) / longest_s)))
    per_part = -(-num_tiles // parts) * tile
    return [(low, min(low + per_part, group.rows)) for low in range(0, group.rows, per_part)]
