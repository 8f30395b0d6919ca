"""The one loss that every solver minimises: the squared output error on the calibration tokens.

Dimension suffixes: O = out_features (rows), I = in_features.

For inputs x with second moment H = sum x x^T and a row's weight error dw, the squared output error summed over tokens
is dw H dw^T: no token has to be seen again.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_COLUMNS = 192
"""Columns of a symmetric product that are made together: fewer would spare more of it, and multiply more slowly. Part
of the order of summation."""


def column_blocks(num_columns: int) -> list[slice]:
    """Return the columns of a symmetric matrix in blocks, of which each is made from its diagonal on."""
    return [slice(start, min(start + BLOCK_COLUMNS, num_columns)) for start in range(0, num_columns, BLOCK_COLUMNS)]


def row_losses(delta_OI: Tensor, second_moment_II: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return float64 [O]: dw H dw^T of every row.

    Products are made and accumulated in ``dtype``, the sum over columns in float64. H is positive semidefinite, so what
    rounding leaves below zero is zero. Half of the products follow from the other half, as H is symmetric.

    Args:
        delta_OI: float32 [O, I].
        second_moment_II: float32 [I, I], symmetric.
        dtype: float32, or float64 for rows whose errors were made to cancel in the sums: there float32 leaves few
            digits.
    """
    total_O = torch.zeros(delta_OI.shape[0], dtype=torch.float64, device=delta_OI.device)
    for columns in column_blocks(delta_OI.shape[1]):
        own_OB = delta_OI[:, columns].to(dtype)
        moved_OB = own_OB @ second_moment_II[columns, columns].to(dtype)
        if columns.start:
            # What is above the diagonal counts for what is below it too.
            above_OI, above_IB = delta_OI[:, : columns.start], second_moment_II[: columns.start, columns]
            moved_OB.addmm_(above_OI.to(dtype), above_IB.to(dtype), alpha=2)
        total_O += moved_OB.mul_(own_OB).sum(-1, dtype=torch.float64)
    return total_O.clamp_min_(0.0)
