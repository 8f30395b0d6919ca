"""Compensation: the weights it leads to are what the formula promises, and a row does not see the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize.compensation import compensated, compensation

seeds = st.integers(0, 2**31)
widths = st.integers(1, 40)
dampings = st.sampled_from([0.01, 0.1, 1.0])


def inputs(width: int, num_tokens: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return correlated inputs [tokens, width] and the same with errors, float32."""
    torch.manual_seed(seed)
    x_TI = torch.randn(num_tokens, width) @ torch.randn(width, width)
    return x_TI, x_TI + noise * torch.randn(num_tokens, width) @ torch.randn(width, width)


def moments(x_TI: Tensor, behind_TI: Tensor) -> tuple[Tensor, Tensor]:
    return behind_TI.T @ behind_TI, x_TI.T @ behind_TI


@settings(max_examples=30, deadline=None)
@given(widths, st.integers(1, 80), dampings, seeds)
def test_the_whole_way_leads_to_the_least_squares_solution(
    width: int, num_tokens: int, damping: float, seed: int
) -> None:
    """In float64: least squares over the tokens and, for each channel, a row that says how far weights may move."""
    x_TI, behind_TI = inputs(width, num_tokens, seed)
    second, cross = moments(x_TI, behind_TI)
    weight_OI = torch.randn(5, width)
    pull = float(damping * second.double().diagonal().mean()) ** 0.5
    rows = torch.cat([behind_TI.double(), pull * torch.eye(width, dtype=torch.float64)])
    wanted = torch.cat([x_TI.double() @ weight_OI.double().T, pull * weight_OI.double().T])
    oracle = torch.linalg.lstsq(rows, wanted).solution.T
    found = compensated(weight_OI, compensation(second, cross, 1.0, damping))
    assert float((found - oracle).norm() / oracle.norm()) < 1e-3


@settings(max_examples=20, deadline=None)
@given(widths, dampings, st.floats(0.05, 1.0), seeds)
def test_the_error_falls_with_every_step_of_the_way(width: int, damping: float, share: float, seed: int) -> None:
    x_TI, behind_TI = inputs(width, 200, seed)
    second, cross = moments(x_TI, behind_TI)
    weight_OI = torch.randn(5, width)

    def error(part: float) -> float:
        found = compensated(weight_OI, compensation(second, cross, part, damping)).double()
        return float((x_TI.double() @ weight_OI.double().T - behind_TI.double() @ found.T).square().sum())

    assert error(share) < error(0.0) * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 500), seeds)
def test_a_row_is_the_same_whatever_it_stands_among(num_rows: int, seed: int) -> None:
    x_TI, behind_TI = inputs(24, 60, seed)
    change = compensation(*moments(x_TI, behind_TI), 0.5)
    weight_OI = torch.randn(num_rows, 24)
    whole = compensated(weight_OI, change)
    for row in {0, num_rows // 2, num_rows - 1}:
        assert torch.equal(compensated(weight_OI[row : row + 1], change)[0], whole[row])


def test_nothing_changes_where_inputs_are_the_same_or_none_of_the_way_is_gone() -> None:
    x_TI, behind_TI = inputs(16, 100, 1)
    assert not compensation(*moments(x_TI, x_TI), 1.0).any()
    assert not compensation(*moments(x_TI, behind_TI), 0.0).any()
    dead = torch.zeros(16, 16)
    assert not compensation(dead, dead, 1.0).any()


def test_statistics_that_are_no_moment_are_refused() -> None:
    damaged = -torch.eye(8)
    with pytest.raises(QuantizationError, match="could not be factored") as caught:
        compensation(damaged, damaged, 0.5)
    assert caught.value.code == "quantize.not_factorable"
