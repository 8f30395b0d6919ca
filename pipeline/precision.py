"""In what precision passes over text are computed."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    """What the factors of matrix products inside decoder blocks are rounded to; sums are float32 either way."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
