"""The layouts of compressed-tensors: the library calls each a format, and one file may hold several."""

from __future__ import annotations

from enum import StrEnum

from pipeline.quantize.types import Scheme
from pipeline.spec import Activations


class Layout(StrEnum):
    """How the codes of a linear lie in its tensors."""

    PACKED = "pack-quantized"
    """Integer codes in 32-bit words, for weights that engines turn back into 16 bit."""
    INT8 = "int-quantized"
    """Integer codes of 8 bits, one to a byte, which engines multiply as they are."""
    FLOAT8 = "float-quantized"
    """Floating-point numbers of 8 bits, likewise."""


def layout_of(scheme: Scheme) -> Layout:
    """Return how the codes of a grid lie."""
    if scheme.is_float:
        return Layout.FLOAT8
    return Layout.PACKED if scheme.activations is Activations.NONE else Layout.INT8
