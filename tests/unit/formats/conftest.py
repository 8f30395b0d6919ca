"""Quantized linears with every code, and scales that every format can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.quantize.types import QuantizedLinear, Scheme
from tests.factories import UNSOLVED


@pytest.fixture(scope="session")
def make_linear() -> Callable[..., QuantizedLinear]:
    def make(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> QuantizedLinear:
        generator = torch.Generator().manual_seed(seed)
        shape = rows, columns // scheme.group_size
        exponent = torch.randint(-14, 3, shape, generator=generator)
        scale = torch.ldexp(torch.randint(128, 256, shape, generator=generator) / 128, exponent)
        zero = torch.full(shape, scheme.middle, dtype=torch.uint8)
        if not scheme.symmetric:
            zero = torch.randint(0, scheme.max_code + 1, shape, generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, scheme.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
        return QuantizedLinear(scheme, codes, scale, zero, UNSOLVED)

    return make
