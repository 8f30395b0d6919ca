"""Scales that mean the same in every format and engine.

A scale is stored as float16 by some formats and as the model's dtype by others, and engines convert freely. Only
numbers exact in both float16 and bfloat16 (8 significant bits, 2**-14 ... 65280) mean the same everywhere, so searches
run over exactly those. There are 128 of them in every octave, 0.4-0.8 % apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 2.0**-14
"""The smallest normal float16."""

MAX_SCALE = 65280.0
"""The largest float16 with 8 significant bits."""

STEP = 1 << 16
"""From the bit pattern of a storable scale to that of the next: the pattern of a positive float is monotone."""

SCALES_IN_OCTAVE = 128
"""Storable scales from one to twice of it."""


def storable_scale(scale: Tensor, *, round_up: bool = False) -> Tensor:
    """Return float32 scales that float16 and bfloat16 both hold exactly, of the same shape.

    Args:
        scale: Wished scales, any shape; infinite ones become the largest storable scale.
        round_up: Take the next storable scale not below the wish (so that a range that fits keeps fitting) instead of
            the nearest one.
    """
    wished = scale.to(torch.float32).clamp(MIN_SCALE, MAX_SCALE)
    storable = wished.to(torch.bfloat16).to(torch.float32)
    if round_up:
        above = (storable.view(torch.int32) + STEP).view(torch.float32)
        storable = torch.where(storable < wished, above, storable)
    return storable
