"""The solvers' loops for GPUs, in Triton. ``gptq.py`` and ``statistics.py`` say what they compute.

Dimension suffixes: N = linears of one shape, I = columns of a weight, B = columns of a block, R = rows of a tile
(contiguous), T = tokens.

Columns. One program takes some rows of a block of columns of one linear and keeps their targets in registers from the
first column to the last. What a column errs is fed forward to all columns after it at once, so each column's target
gets its sums in the order of the columns, as on the CPU; with fused multiply-add, which is asked for by name as
Triton's default for it changes between versions. One launch a block, of several linears where these are small, as
experts are; nothing is told to the host.

Second moments. Inputs in bfloat16 are multiplied as they are (the product of two is exact in float32) and summed in
float32. x^T x is symmetric: one program makes one tile on or below the diagonal, and writes it to its mirror's place
too, so half of the products are spared. Tiles of a matrix, and tokens within a tile, are added in a fixed order.

Triton comes with torch's CUDA builds for Linux. It is imported by the first that needs it, so no other machine has to
have it. Its interpreter (``TRITON_INTERPRET=1``) runs these on the CPU, which is how tests hold them to what torch
computes (``make test-kernels``).

The loops have not been timed: no GPU was at hand. Sizes of tiles are what fits an SM's registers, not what won.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.compiled import PUSH
from pipeline.errors import QuantizationError

ROWS = 32
"""Rows of a program that solves columns: with 128 columns, 32 numbers for each thread of four warps."""

COLUMNS = 128
"""Rows and columns of a tile of a second moment."""

TOKENS = 64
"""Tokens that a program loads at once."""


def take(tensor: Tensor) -> bool:
    """Return whether the loops here work on tensors like this one: on a GPU, and on the columns of a weight in float32
    or inputs in bfloat16."""
    return tensor.device.type == "cuda" and tensor.dtype in (torch.float32, torch.bfloat16)


@cache
def load() -> Any:
    """Return the module with the loops; from then on they are there.

    Raises:
        QuantizationError: when Triton is not there.
    """
    try:
        from pipeline.quantize import triton_loops
    except ImportError as error:
        raise QuantizationError(
            f"a GPU needs loops that are written in Triton, which cannot be imported: {error}",
            hint="it comes with torch's CUDA builds for Linux; or run with --device cpu",
            code="quantize.no_triton",
        ) from error
    return triton_loops


def solve_block(
    target_NBR: Tensor,
    weight_NBR: Tensor,
    feedback_NBB: Tensor,
    group_NB: Tensor,
    scale_NGR: Tensor,
    zero_NGR: Tensor,
    max_code: int,
    pivot_NB: Tensor,
    added_NB: Tensor,
    step_NBR: Tensor,
    error_NBR: Tensor,
    loss_NR: Tensor,
    error_norm_NR: Tensor,
) -> None:
    """Do for each of N linears what ``kernels.solve_block`` does, with the same arguments, in one launch. Where they
    are parts of tensors of all columns, these may lie apart; the others are contiguous.

    Raises:
        QuantizationError: when Triton is not there.
    """
    num_linears, num_columns, num_rows = target_NBR.shape
    loops = load()
    loops.solve_block[loops.cdiv(num_rows, ROWS), num_linears](
        target_NBR,
        weight_NBR,
        feedback_NBB,
        group_NB,
        scale_NGR,
        zero_NGR,
        pivot_NB,
        added_NB,
        step_NBR,
        error_NBR,
        loss_NR,
        error_norm_NR,
        num_rows,
        num_columns,
        group_NB.stride(0),
        scale_NGR.shape[1],
        float(max_code),
        PUSH=PUSH,
        COLUMNS=loops.next_power_of_2(num_columns),
        ROWS=ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )


def add_products(moment_II: Tensor, x_TI: Tensor) -> Tensor:
    """Add x^T x in place and return the sum.

    Args:
        moment_II: float32 [I, I], symmetric and contiguous.
        x_TI: bfloat16 [T, I].

    Raises:
        QuantizationError: when Triton is not there.
    """
    loops = load()
    x_TI = x_TI.contiguous()
    num_tokens, width = x_TI.shape
    tiles = loops.cdiv(width, COLUMNS)
    loops.add_products[tiles * (tiles + 1) // 2,](
        moment_II, x_TI, num_tokens, width, COLUMNS=COLUMNS, TOKENS=TOKENS, num_warps=8, enable_fp_fusion=True
    )
    return moment_II
