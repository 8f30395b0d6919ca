"""What every solver refuses, said once.

Dimension suffixes: O = out_features (rows), I = in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.finite import is_finite
from pipeline.quantize.types import Scheme, Statistics


def require_solvable(weight_OI: Tensor, statistics: Statistics, scheme: Scheme) -> None:
    """Return when weight, statistics and scheme fit together and are finite.

    Raises:
        QuantizationError: naming what does not.
    """
    if weight_OI.ndim != 2 or weight_OI.dtype is not torch.float32:
        raise QuantizationError(f"weight is {weight_OI.dtype} {list(weight_OI.shape)}, solvers take float32 [out, in]")
    in_features = weight_OI.shape[1]
    if statistics.second_moment_II.shape != (in_features, in_features) or statistics.abs_sum_I.shape != (in_features,):
        found = list(statistics.second_moment_II.shape)
        raise QuantizationError(f"weight has {in_features} columns, but the statistics' second moment is {found}")
    if not 2 <= scheme.bits <= 8:
        raise QuantizationError(f"codes of {scheme.bits} bits are not solved here: 2 to 8 are")
    if scheme.group_size <= 0 or in_features % scheme.group_size:
        raise QuantizationError(f"group size {scheme.group_size} does not divide {in_features} columns")
    if statistics.num_tokens <= 0:
        raise QuantizationError("statistics cover no tokens", hint="calibrate on at least one sequence")
    require_finite("weight", weight_OI)
    require_finite("second moment of the inputs", statistics.second_moment_II)
    require_finite("mean of the inputs", statistics.abs_sum_I)
    if bool((statistics.second_moment_II.diagonal() < 0).any()):
        raise QuantizationError("second moment of the inputs has a negative diagonal: it is no sum of squares")


def require_finite(name: str, tensor: Tensor) -> None:
    """Return when every value is finite.

    Raises:
        QuantizationError: with ``name``, the number of NaN or infinite values and the place of the first.
    """
    if is_finite(tensor):
        return
    finite = tensor.isfinite()
    bad = (~finite).nonzero()
    where = bad[0].tolist()
    raise QuantizationError(
        f"{name} has {bad.shape[0]} values that are NaN or infinite, the first at {where}", code="quantize.not_finite"
    )
