"""Numbers of 8 bits, E4M3: a sign, four bits of exponent, three of fraction.

The format is that of the Open Compute Project's OFP8 specification (revision 1.0, 2023): no infinities, the largest
number 448, the smallest normal one 2**-6, and below it steps of 2**-9. It is torch's ``float8_e4m3fn``, which rounds to
nearest, ties to even, and turns what is too large into NaN: so numbers are limited to 448 first.

Steps get wider with the number, so a scale need not follow the largest weight closely: from 448 down to 2**-6 the
relative error is at most 2**-4. What is left to choose is where between two powers of two weights come to lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_NUMBER = 448.0
"""The largest number."""

MIN_NORMAL = 2.0**-6
"""The smallest number with all four significant bits."""

BITS = 8
"""Width of a code."""


def encode(numbers: Tensor) -> Tensor:
    """Return the bit patterns (uint8) of the nearest numbers, ties to even; float32 of any shape, finite."""
    return numbers.clamp(-MAX_NUMBER, MAX_NUMBER).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Return the numbers (float32, memory of its own) of bit patterns, uint8 of any shape."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def round_(numbers: Tensor) -> Tensor:
    """Round float32 numbers of any shape to the nearest, in place, and return them."""
    return numbers.copy_(numbers.clamp_(-MAX_NUMBER, MAX_NUMBER).to(torch.float8_e4m3fn))
