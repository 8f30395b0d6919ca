"""GPTQ's column recursion against the textbook, and its laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.quantize.gptq import Factor, damping_ladder, factor
from pipeline.quantize.grid import channel_importance, encode, fit_grid
from pipeline.quantize.types import Scheme, Statistics, dequantize
from tests.factories import columns_of

Layer = Callable[..., tuple[Tensor, Statistics]]
SCHEMES = [Scheme(4, 16, True), Scheme(4, 16, False), Scheme(8, 48, True), Scheme(8, 16, False)]


def _textbook(weight: Tensor, moment: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, damping: float) -> Tensor:
    """Optimal brain quantization in float64 as published: columns in falling order of the diagonal, an explicit
    inverse that loses a row and column at every step, every remaining weight updated at once."""
    weight, moment = weight.double().clone(), moment.double().clone()
    mean = moment.diagonal().mean()
    order = torch.argsort(moment.diagonal(), descending=True, stable=True).tolist()
    moment += torch.diag(torch.where(moment.diagonal() == 0, mean, 0.0) + damping * mean)
    inverse = torch.linalg.inv(moment)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    left = list(order)
    for column in order:
        s, z = scale[:, column // scheme.group_size].double(), zero[:, column // scheme.group_size].double()
        code = (torch.round(weight[:, column] / s) + z).clamp(0, scheme.max_code)
        codes[:, column] = code.to(torch.uint8)
        error = (weight[:, column] - s * (code - z)) / inverse[column, column]
        left.remove(column)
        weight[:, left] -= error[:, None] * inverse[column, left][None, :]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column, :]) / inverse[column, column]
    return codes


def _grid(weight: Tensor, moment: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    return fit_grid(weight, channel_importance(moment.diagonal()), scheme, search=True)


def _factored(moment: Tensor, damping: float = 0.01, act_order: bool = True) -> Factor:
    factored = factor(moment, damping, act_order)
    assert factored is not None
    return factored


def _in_float64(factored: Factor) -> Factor:
    return replace(factored, feedback_II=factored.feedback_II.double())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_the_textbook_with_an_explicit_inverse(layer: Layer, scheme: Scheme) -> None:
    weight, statistics = layer(40, 96)
    moment = statistics.second_moment_II
    scale, zero = _grid(weight, moment, scheme)
    solved = columns_of(weight.double(), scale.double(), zero, scheme, _in_float64(_factored(moment)))
    expected = _textbook(weight, moment, scale, zero, scheme, 0.01)
    assert bool(solved.is_finite_O.all())
    # The factor was rounded to float32, so a few values next to a tie may fall on the other side.
    assert float((solved.codes_OI != expected).double().mean()) < 0.002
    in_float32 = columns_of(weight, scale, zero, scheme, _factored(moment)).codes_OI
    assert float((in_float32 != expected).double().mean()) < 0.002


@pytest.mark.parametrize("act_order", [True, False])
def test_factor_reproduces_the_damped_moment(layer: Layer, act_order: bool) -> None:
    moment = layer(1, 48)[1].second_moment_II
    factored = _factored(moment, 0.1, act_order)
    ordered = moment.double()[factored.order_I][:, factored.order_I]
    damped = ordered + 0.1 * ordered.diagonal().mean() * torch.eye(48)
    # H = R R^T with R = (F + 1) diag(R): recover diag(R)^2 from the last column up.
    unit = factored.feedback_II.double() + torch.eye(48)
    middle = torch.linalg.solve_triangular(unit, damped, upper=True)
    middle = torch.linalg.solve_triangular(unit, middle.t(), upper=True)
    torch.testing.assert_close(middle, torch.diag(middle.diagonal()), rtol=0, atol=1e-5 * float(damped.max()))
    assert bool((middle.diagonal() > 0).all())
    diagonal = ordered.diagonal()
    assert not act_order or bool((diagonal[:-1] >= diagonal[1:]).all())
    assert act_order or torch.equal(factored.order_I, torch.arange(48))


def test_ties_keep_their_order() -> None:
    factored = _factored(torch.diag(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])))
    assert factored.order_I.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_block_size_does_not_change_the_codes(layer: Layer, scheme: Scheme) -> None:
    weight, statistics = layer(32, 144)
    moment = statistics.second_moment_II
    scale, zero = _grid(weight, moment, scheme)
    factored = _in_float64(_factored(moment))
    results = [
        columns_of(weight.double(), scale.double(), zero, scheme, factored, block_size).codes_OI
        for block_size in (1, 7, 32, 128, 1000)
    ]
    assert all(torch.equal(codes, results[0]) for codes in results)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_diagonal_moment_makes_it_exactly_rounding(layer: Layer, scheme: Scheme) -> None:
    weight, _ = layer(32, 144)
    moment = torch.diag(torch.rand(144, generator=torch.Generator().manual_seed(1)) + 0.01)
    scale, zero = _grid(weight, moment, scheme)
    codes = columns_of(weight, scale, zero, scheme, _factored(moment)).codes_OI
    assert torch.equal(codes, encode(weight, scale, zero, scheme))


def test_inputs_that_were_never_alive_are_rounded_to_nearest(layer: Layer) -> None:
    weight, statistics = layer(32, 96)
    moment, dead = statistics.second_moment_II.clone(), [3, 40, 95]
    moment[dead], moment[:, dead] = 0.0, 0.0
    scheme = SCHEMES[0]
    scale, zero = _grid(weight, moment, scheme)
    codes = columns_of(weight, scale, zero, scheme, _factored(moment)).codes_OI
    assert torch.equal(codes[:, dead], encode(weight, scale, zero, scheme)[:, dead])


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_losses_from_residuals_are_those_of_the_codes(layer: Layer, damping: float) -> None:
    weight, statistics = layer(32, 96)
    moment, dead = statistics.second_moment_II.clone(), [3, 40, 95]
    moment[dead], moment[:, dead] = 0.0, 0.0
    scheme = SCHEMES[0]
    scale, zero = _grid(weight, moment, scheme)
    solved = columns_of(weight, scale, zero, scheme, _factored(moment, damping), block_size=32)
    delta = (dequantize(solved.codes_OI, scale, zero, scheme) - weight).double()
    norm = delta.square().sum(-1)
    damped = float((damping * moment.diagonal().mean() * norm).max())
    torch.testing.assert_close(
        solved.loss_O, ((delta @ moment.double()) * delta).sum(-1), rtol=1e-4, atol=1e-5 * damped
    )
    torch.testing.assert_close(solved.error_norm_O, norm, rtol=1e-5, atol=0)


def test_nothing_alive_at_all_is_rounding(layer: Layer) -> None:
    weight, _ = layer(8, 32)
    scheme = Scheme(4, 16, True)
    scale, zero = fit_grid(weight, torch.ones(32), scheme, search=True)
    codes = columns_of(weight, scale, zero, scheme, _factored(torch.zeros(32, 32))).codes_OI
    assert torch.equal(codes, encode(weight, scale, zero, scheme))


def test_scale_of_the_moment_does_not_matter(layer: Layer) -> None:
    weight, statistics = layer(32, 96)
    scheme = SCHEMES[0]
    scale, zero = _grid(weight, statistics.second_moment_II, scheme)
    results = [
        columns_of(weight, scale, zero, scheme, _factored(statistics.second_moment_II * 2.0**power)).codes_OI
        for power in (-60, 0, 60)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[1])


def test_indefinite_moment_is_not_factored_until_damped_enough() -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    moment = basis @ torch.diag(torch.tensor([-0.05] + [1.0] * 15)) @ basis.t()
    assert factor(moment, 0.01, act_order=True) is None
    assert factor(moment, 0.1, act_order=True) is not None


def test_rows_that_overflow_are_told_apart(layer: Layer) -> None:
    weight, statistics = layer(4, 32)
    scheme = Scheme(4, 16, True)
    scale, zero = _grid(weight, statistics.second_moment_II, scheme)
    weight[2, 5] = float("inf")
    is_finite = columns_of(weight, scale, zero, scheme, _factored(statistics.second_moment_II)).is_finite_O
    assert is_finite.tolist() == [True, True, False, True]


def test_ladder_climbs_tenfold_and_ends_at_one() -> None:
    assert list(damping_ladder(0.01)) == pytest.approx([0.01, 0.1, 1.0])
    assert list(damping_ladder(0.05)) == pytest.approx([0.05, 0.5, 1.0])
    assert list(damping_ladder(1.0)) == [1.0]
