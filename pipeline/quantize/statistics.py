"""Sums over calibration tokens: how they start, grow, merge, change basis and are stored.

Dimension suffixes: T = tokens, I = in_features.

For inputs x the second moment is H = sum over tokens of x x^T. The product of two bfloat16 numbers is exact in
float32, so for bfloat16 inputs nothing but the order of the float32 additions is lost; nothing is scaled on the way in.
Sums of sums are sums: the statistics of all tokens are the merge of the statistics of slices. Addition in float32 is
not associative, so whoever merges fixes the slices and their order, and then the result is the same on any machine
count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize import triton_kernels
from pipeline.quantize.loss import column_blocks
from pipeline.quantize.types import Statistics

_DTYPES = {
    "second_moment": torch.float32,
    "abs_sum": torch.float32,
    "abs_max": torch.float32,
    "num_tokens": torch.int64,
    "shrinkage": torch.float64,
}
"""Of the tensors that statistics are stored as."""


def empty(in_features: int, device: torch.device | str = "cpu") -> Statistics:
    """Return the statistics of no tokens: float32 zeros for ``in_features`` channels on ``device``."""
    return Statistics(
        second_moment_II=torch.zeros(in_features, in_features, dtype=torch.float32, device=device),
        abs_sum_I=torch.zeros(in_features, dtype=torch.float32, device=device),
        abs_max_I=torch.zeros(in_features, dtype=torch.float32, device=device),
        num_tokens=0,
    )


def accumulate(statistics: Statistics, x_TI: Tensor) -> Statistics:
    """Return the statistics with the tokens of ``x_TI`` added.

    The tensors of ``statistics`` are updated in place and belong to the result, because H is the largest thing in
    memory here: use the result and forget the argument.

    Args:
        statistics: What to add to.
        x_TI: Inputs [T, I] in any floating dtype, on the statistics' device. T may be 0.

    Raises:
        QuantizationError: when ``x_TI`` does not have I columns.
    """
    in_features = statistics.abs_sum_I.shape[0]
    if x_TI.ndim != 2 or x_TI.shape[1] != in_features:
        raise QuantizationError(f"inputs of shape {list(x_TI.shape)} cannot be added to {in_features} channels")
    x_TI = x_TI.detach()
    if x_TI.shape[0] == 0:
        return statistics
    wide_TI = x_TI.to(torch.float32)
    abs_TI = wide_TI.abs()
    if x_TI.dtype is torch.bfloat16 and triton_kernels.take(x_TI):
        second_moment_II = triton_kernels.add_products(statistics.second_moment_II, x_TI)
    else:
        second_moment_II = _add_products(statistics.second_moment_II, wide_TI)
    return Statistics(
        second_moment_II=second_moment_II,
        abs_sum_I=statistics.abs_sum_I.add_(abs_TI.sum(0)),
        abs_max_I=torch.maximum(statistics.abs_max_I, abs_TI.amax(0), out=statistics.abs_max_I),
        num_tokens=statistics.num_tokens + x_TI.shape[0],
    )


def _add_products(second_moment_II: Tensor, x_TI: Tensor) -> Tensor:
    """Add x^T x in place and return the sum. The products are symmetric: blocks of columns are made from the diagonal
    on down, and what is above it is a copy."""
    for columns in column_blocks(x_TI.shape[1]):
        below = slice(columns.start, None)
        rest = slice(columns.stop, None)
        second_moment_II[below, columns].addmm_(x_TI[:, below].t(), x_TI[:, columns])
        second_moment_II[columns, rest] = second_moment_II[rest, columns].t()
    return second_moment_II


def add(total: Statistics, part: Statistics) -> Statistics:
    """Return the statistics of the tokens of both.

    The tensors of ``total`` are updated in place and belong to the result: use the result and forget the argument.
    """
    total.second_moment_II.add_(part.second_moment_II)
    total.abs_sum_I.add_(part.abs_sum_I)
    torch.maximum(total.abs_max_I, part.abs_max_I, out=total.abs_max_I)
    return replace(total, num_tokens=total.num_tokens + part.num_tokens)


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of all tokens of ``parts``, added from first to last; the parts stay as they are.

    Raises:
        QuantizationError: when there are no parts or they have different channels.
    """
    if not parts:
        raise QuantizationError("there are no statistics to merge")
    widths = {part.abs_sum_I.shape[0] for part in parts}
    if len(widths) > 1:
        raise QuantizationError(f"statistics of {sorted(widths)} channels cannot be merged")
    first = parts[0]
    total = Statistics(
        first.second_moment_II.clone(), first.abs_sum_I.clone(), first.abs_max_I.clone(), first.num_tokens
    )
    for part in parts[1:]:
        total = add(total, part)
    return total


def rescale(statistics: Statistics, scale_I: Tensor) -> Statistics:
    """Return the statistics of x / s for positive ``scale_I`` (float32 [I]): H_ij / (s_i s_j), sums and maxima / s."""
    scale_I = scale_I.to(statistics.second_moment_II.device, torch.float32)
    return Statistics(
        second_moment_II=statistics.second_moment_II.div(scale_I[:, None]).div_(scale_I[None, :]),
        abs_sum_I=statistics.abs_sum_I / scale_I,
        abs_max_I=statistics.abs_max_I / scale_I,
        num_tokens=statistics.num_tokens,
        shrinkage=statistics.shrinkage,
    )


def to_tensors(statistics: Statistics) -> dict[str, Tensor]:
    """Return the statistics as named tensors for storage; ``from_tensors`` is the exact inverse."""
    return {
        "second_moment": statistics.second_moment_II,
        "abs_sum": statistics.abs_sum_I,
        "abs_max": statistics.abs_max_I,
        "num_tokens": torch.tensor([statistics.num_tokens], dtype=torch.int64),
        "shrinkage": torch.tensor([statistics.shrinkage], dtype=torch.float64),
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> Statistics:
    """Return the statistics stored by ``to_tensors``.

    Raises:
        QuantizationError: naming the tensor that is missing or has the wrong dtype or shape.
    """
    missing = [name for name in _DTYPES if name not in tensors]
    if missing:
        raise QuantizationError(f"stored statistics lack {', '.join(missing)}")
    width = tensors["abs_sum"].numel()
    shapes = {"second_moment": [width, width], "abs_sum": [width], "abs_max": [width]}
    for name, dtype in _DTYPES.items():
        shape = shapes.get(name, [1])
        if list(tensors[name].shape) != shape or tensors[name].dtype is not dtype:
            found = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            raise QuantizationError(f"stored statistics: {name} is {found}, expected {dtype} {shape}")
    return Statistics(
        second_moment_II=tensors["second_moment"],
        abs_sum_I=tensors["abs_sum"],
        abs_max_I=tensors["abs_max"],
        num_tokens=int(tensors["num_tokens"].item()),
        shrinkage=float(tensors["shrinkage"].item()),
    )
