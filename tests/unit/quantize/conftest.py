"""Layers and inputs that look like those of a language model: correlated channels, a few loud ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.quantize import solve
from pipeline.quantize.statistics import accumulate, empty
from pipeline.quantize.types import Statistics

Layer = Callable[..., tuple[Tensor, Statistics]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every solve works on whole tiles; small ones make small layers cheap and large ones span several."""
    monkeypatch.setitem(solve.TILE_ROWS, "cpu", 64)


@pytest.fixture(scope="session")
def layer() -> Layer:
    def make(rows: int, columns: int, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Statistics]:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns) / 2
        loudness = torch.exp(torch.randn(columns, generator=generator))
        x = torch.randn(tokens, columns, generator=generator) @ mixing * loudness
        weight = torch.randn(rows, columns, generator=generator) * 0.04
        return weight, accumulate(empty(columns), x.bfloat16())

    return make
