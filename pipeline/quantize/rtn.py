"""Rounding to nearest on a fitted grid.

Dimension suffixes: O = out_features (rows), I = in_features, G = groups of a row, g = columns of a group.

What is left to choose is the grid, see ``grid.py``. The importance that the grid is fitted with is the diagonal of the
second moment here; activation-aware quantization rounds with the groups' blocks of it (``awq.py``).
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quantize.grid import encode, fit_grid
from pipeline.quantize.types import Scheme


def round_rows(weight_OI: Tensor, importance: Tensor, scheme: Scheme, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (uint8 [O, I]), scale (float32 [O, G]) and zero point (uint8 [O, G]) of every row by itself.

    Args:
        weight_OI: float32 [O, I], finite.
        importance: float32 [I] or [G, g, g], as ``fit_grid`` takes it.
        scheme: Grid; its group size divides I.
        search: Whether to search each group's range for the least error.
    """
    scale_OG, zero_OG = fit_grid(weight_OI, importance, scheme, search)
    return encode(weight_OI, scale_OG, zero_OG, scheme), scale_OG, zero_OG
