"""The nouns of quantization: what a solver takes and gives.

Dimension suffixes, here and in every solver and format: O = out_features (rows), I = in_features (columns),
G = groups of a row. A stack of linears that share one input is one matrix whose rows are theirs in order.

A code q stands for ``scale * (q - zero)`` with 0 <= q < 2**bits. Symmetric grids have zero = 2**(bits - 1) everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """The grid of one linear.

    Attributes:
        bits: Width of a code.
        group_size: Consecutive input channels that share a scale; it divides in_features (never -1 here).
        symmetric: Whether the zero point is fixed at ``2**(bits - 1)``.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def max_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, ``2**(bits - 1)``."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Statistics:
    """What calibration keeps of a linear's inputs x: sums and maxima over tokens, so they merge until they are shrunk.

    Attributes:
        second_moment_II: float32 [I, I], the sum of x x^T.
        abs_sum_I: float32 [I], the sum of |x|.
        abs_max_I: float32 [I], the maximum of |x|.
        num_tokens: Number of x that were summed.
        shrinkage: Share of the second moment's off-diagonal entries that was taken off (``shrinkage.py``); 0 for sums.
    """

    second_moment_II: Tensor
    abs_sum_I: Tensor
    abs_max_I: Tensor
    num_tokens: int
    shrinkage: float = 0.0


@dataclass(frozen=True)
class SolveReport:
    """What happened in a solve, for one linear.

    Attributes:
        loss: tr(dW H dW^T) / num_tokens, H the second moment before it was shrunk: mean squared output error on the
            calibration tokens, summed over outputs.
        relative_error: sqrt(tr(dW H dW^T) / tr(W H W^T)), dimensionless.
        weight_error: ||dW|| / ||W||, Frobenius, dimensionless.
        damping: Fraction of the mean diagonal that was added to H before it was factored; 0 where nothing was factored.
        shrinkage: Share of H's off-diagonal entries that was taken off to solve.
        clip: Mean over groups of the scale over the one that clips nothing; below 1 the largest weights were clipped.
        num_tokens: Tokens that H is the sum over.
        num_dead_inputs: Input channels that were zero on every token.
        num_rounds: Rounds of refinement that lowered the loss of some row.
        degradations: What was done otherwise than asked, in words; empty when nothing was.
    """

    loss: float
    relative_error: float
    weight_error: float
    damping: float
    shrinkage: float
    clip: float
    num_tokens: int
    num_dead_inputs: int
    num_rounds: int
    degradations: tuple[str, ...]


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and grid of one linear, ready for any format.

    Attributes:
        scheme: The grid's bits, group size and symmetry.
        codes_OI: uint8 [O, I], values 0 .. 2**bits - 1.
        scale_OG: float32 [O, G], positive, normal, and exact in both float16 and bfloat16, so that every format and
            engine computes with the same number.
        zero_OG: uint8 [O, G]; all ``scheme.middle`` when symmetric.
        report: What happened in the solve.
    """

    scheme: Scheme
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    report: SolveReport

    def dequantize(self) -> Tensor:
        """Return float32 [O, I]: ``scale * (code - zero)``, exact in float32."""
        return dequantize(self.codes_OI, self.scale_OG, self.zero_OG, self.scheme.group_size)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_size: int) -> Tensor:
    """Return float32 [O, I], ``scale * (code - zero)`` with the scale and zero of column i taken from group
    i // group_size. The difference of two codes is an integer below 2**9, so the product is rounded once."""
    num_rows, num_columns = codes_OI.shape
    centred = codes_OI.to(torch.int16).view(num_rows, -1, group_size) - zero_OG.to(torch.int16)[..., None]
    return (centred.to(torch.float32) * scale_OG.to(torch.float32)[..., None]).view(num_rows, num_columns)
