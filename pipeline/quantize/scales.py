"""The search for scales of a linear's input channels that follow from one exponent, whatever they are made of.

Dimension suffixes: O = out_features (rows of the whole stack), I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

COARSE_EXPONENTS = tuple(k / 5 for k in range(6))
FINE_OFFSETS = (-0.1, 0.1, -0.05, 0.05, -0.025, 0.025)
"""Tried around the best exponent so far, one after the other."""

SEARCH_ROWS = 512
"""Rows that the exponent is searched on, at most."""

MAX_SCALE_RATIO = 1e4
"""Scales stay within this factor of 1, so that scaled weights stay far inside float16."""


@dataclass(frozen=True)
class FoundScales:
    """The scaling of one linear input.

    Attributes:
        scale_I: float32 [I], positive; all ones when scaling does not help.
        exponent: The exponent that gave them; 0 when scaling does not help.
        loss_unscaled: What was searched for the least of, a mean over tokens, of the searched rows without scaling.
        loss_scaled: The same with the scales, never larger.
    """

    scale_I: Tensor
    exponent: float
    loss_unscaled: float
    loss_scaled: float


def sample_rows(weight_OI: Tensor) -> Tensor:
    """Return rows that stand for all: SEARCH_ROWS at most, evenly spread."""
    return weight_OI[:: -(-weight_OI.shape[0] // SEARCH_ROWS)].contiguous()


def search_exponent(loss_of: Callable[[float], float]) -> tuple[float, float]:
    """Return the exponent from 0 to 1 with the least loss among those that are tried, 0 first, and that loss."""
    best, best_loss = 0.0, loss_of(0.0)
    tried = {0.0}
    for exponent, is_offset in [(e, False) for e in COARSE_EXPONENTS] + [(e, True) for e in FINE_OFFSETS]:
        candidate = round(best + exponent if is_offset else exponent, 4)
        if candidate in tried or not 0.0 <= candidate <= 1.0:
            continue
        tried.add(candidate)
        if (loss := loss_of(candidate)) < best_loss:
            best, best_loss = candidate, loss
    return best, best_loss
