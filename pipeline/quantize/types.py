"""The nouns of quantization: what a solver takes and gives.

Dimension suffixes, here and in every solver and format: O = out_features (rows), I = in_features (columns),
G = groups of a row. A stack of linears that share one input is one matrix whose rows are theirs in order.

A code q of an integer grid stands for ``scale * (q - zero)`` with 0 <= q < 2**bits; symmetric ones have zero =
2**(bits - 1) everywhere. A code of a floating-point grid is the bit pattern of a number (``float8.py``), which stands
for ``scale * number``; its zero point is 0 everywhere, the pattern of the number 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pipeline.quantize import float8
from pipeline.spec import Activations, NumberType


@dataclass(frozen=True)
class Scheme:
    """The grid of one linear, and what becomes of its inputs.

    Attributes:
        bits: Width of a code.
        group_size: Consecutive input channels that share a scale; it divides in_features (never -1 here).
        symmetric: Whether there is no zero point: it is fixed at ``middle``.
        type: What codes are; floating-point ones have 8 bits (E4M3) and are symmetric.
        activations: How engines round the linear's inputs, to codes of the same type and width.
    """

    bits: int
    group_size: int
    symmetric: bool
    type: NumberType = NumberType.INT
    activations: Activations = Activations.NONE

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Scheme:
        """Return the scheme that ``params`` are of."""
        given = dict(params)
        for key, kind in (("type", NumberType), ("activations", Activations)):
            if key in given:
                given[key] = kind(given[key])
        return cls(**given)

    @property
    def params(self) -> dict[str, Any]:
        """The scheme as JSON, without what is as it is by default."""
        defaults = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.type is NumberType.FLOAT

    @property
    def max_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: ``2**(bits - 1)``, of a floating-point one 0."""
        return 0 if self.is_float else 1 << (self.bits - 1)


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
        codes_OI: uint8 [O, I], values 0 .. 2**bits - 1, or bit patterns of floating-point numbers.
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
        return dequantize(self.codes_OI, self.scale_OG, self.zero_OG, self.scheme)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme) -> Tensor:
    """Return float32 [O, I], ``scale * (code - zero)`` with the scale and zero of column i taken from group
    i // group_size; of a floating-point grid ``scale * number``. The difference of two codes is an integer below 2**9,
    and a number has 4 significant bits, so the product is rounded once at most."""
    num_rows, num_columns = codes_OI.shape
    codes_OGg = codes_OI.view(num_rows, -1, scheme.group_size)
    if scheme.is_float:
        steps_OGg = float8.decode(codes_OGg)
    else:
        steps_OGg = (codes_OGg.to(torch.int16) - zero_OG.to(torch.int16)[..., None]).to(torch.float32)
    return steps_OGg.mul_(scale_OG.to(torch.float32)[..., None]).view(num_rows, num_columns)
