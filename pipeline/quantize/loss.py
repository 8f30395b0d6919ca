"""The one loss that every solver minimises: the squared output error on the calibration tokens.

Dimension suffixes: O = out_features (rows), I = in_features.

For inputs x with second moment H = sum x x^T and a row's weight error dw, the squared output error summed over tokens
is dw H dw^T: no token has to be seen again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_losses(delta_OI: Tensor, second_moment_II: Tensor) -> Tensor:
    """Return float64 [O]: dw H dw^T of every row.

    The product is accumulated in float32, the sum over columns in float64. H is positive semidefinite, so what
    rounding leaves below zero is zero.

    Args:
        delta_OI: float32 [O, I].
        second_moment_II: float32 [I, I], symmetric.
    """
    return (delta_OI @ second_moment_II).mul_(delta_OI).sum(-1, dtype=torch.float64).clamp_min_(0.0)
