"""Weights that give a linear's float outputs on the inputs that it has behind quantized blocks.

Dimension suffixes: O = rows, I = in_features.

Behind blocks that are quantized already a linear reads x' instead of x. With H' = sum of x' x'^T and C = sum of x x'^T
over tokens, the weights that give W x there are W C H'^-1. Fitted so, they fit the calibration tokens and little else:
what is gained there is lost many times over on other text. So they are drawn towards W twice. V minimises sum |W x - V
x'|^2 + d |V - W|^2, d a fraction of the mean diagonal of H': V = W + W (C - H') (H' + d I)^-1. And only a share of the
way from W to V is gone. H' and C have lost the same share of their off-diagonal entries (``shrinkage.py``). How far is
a figure of the spec; what was measured is in docs/log.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize.solve import TILE_ROWS, TILE_ROWS_DEVICE

DAMPING = 0.3
"""d as a fraction of the mean diagonal of H'."""


def compensation(second_moment_II: Tensor, cross_moment_II: Tensor, share: float, damping: float = DAMPING) -> Tensor:
    """Return M, float32 [I, I], for which W + W M has gone ``share`` of the way to V.

    Computes in float64.

    Args:
        second_moment_II: float32 [I, I], H'.
        cross_moment_II: float32 [I, I], C: rows are channels in the source, columns behind quantized blocks.
        share: Between 0 and 1.
        damping: Fraction of the mean diagonal of H', positive.

    Raises:
        QuantizationError: when H' + d I is not positive definite.
    """
    damped_II = second_moment_II.to(torch.float64)
    change_II = cross_moment_II.to(torch.float64).sub_(damped_II)
    diagonal_I = damped_II.diagonal()
    mean = diagonal_I.mean()
    diagonal_I.add_(damping * mean if mean > 0 else 1.0)
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        raise QuantizationError(
            "the second moment behind quantized blocks could not be factored",
            hint="its statistics are damaged: calibrate again",
            code="quantize.not_factorable",
        )
    del damped_II
    # The damped moment is symmetric, so (A^-1 B^T)^T = B A^-1.
    return torch.cholesky_solve(change_II.t(), lower_II).t().mul_(share).to(torch.float32).contiguous()


def compensated(weight_OI: Tensor, change_II: Tensor) -> Tensor:
    """Return W + W M, float32 [O, I]; each row is bit-identical to what becomes of it alone (see ``solve.py``)."""
    tile_rows = TILE_ROWS.get(weight_OI.device.type, TILE_ROWS_DEVICE)
    tiles = []
    for weight_RI in torch.split(weight_OI, tile_rows):
        padded_RI = torch.nn.functional.pad(weight_RI, (0, 0, 0, tile_rows - weight_RI.shape[0]))
        tiles.append((padded_RI + padded_RI @ change_II)[: weight_RI.shape[0]])
    return torch.cat(tiles)
