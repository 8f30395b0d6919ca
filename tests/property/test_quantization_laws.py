"""Laws of the solvers on shapes, stacks and inputs that nobody chose."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.quantize.awq import search_scales
from pipeline.quantize.gptq import factor
from pipeline.quantize.grid import channel_importance, encode, fit_grid
from pipeline.quantize.solve import TILE_ROWS, SolveOptions, solve
from pipeline.quantize.statistics import accumulate, empty, merge, rescale
from pipeline.quantize.storable import storable_scale
from pipeline.quantize.types import QuantizedLinear, Scheme, Statistics
from pipeline.spec import Method
from tests.factories import columns_of

LAWS = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

schemes = st.builds(
    Scheme, bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group_size=st.sampled_from([8, 16, 24]), symmetric=st.booleans()
)
seeds = st.integers(0, 2**31)
row_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
options = st.builds(
    SolveOptions,
    damping=st.sampled_from([0.001, 0.01, 0.1]),
    act_order=st.booleans(),
    clip_search=st.booleans(),
    refinement=st.sampled_from([0, 2]),
)


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> object:
    with patch.dict(TILE_ROWS, {"cpu": 32}):
        yield


def _layer(rows: int, columns: int, seed: int) -> tuple[Tensor, Statistics]:
    """Return a weight with outliers and statistics of correlated inputs, some loud and some never alive."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns) / 2
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing
    x *= torch.exp(1.5 * torch.randn(columns, generator=generator))
    x *= (torch.rand(columns, generator=generator) > 0.05).float()
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= torch.exp(2 * (torch.rand(rows, columns, generator=generator) < 0.01).float())
    return weight, accumulate(empty(columns), x.bfloat16())


def _output_losses(linear: QuantizedLinear, weight: Tensor, statistics: Statistics) -> Tensor:
    delta = linear.dequantize().double() - weight.double()
    return ((delta @ statistics.second_moment_II.double()) * delta).sum(-1)


@LAWS
@given(st.sampled_from(Method), row_sizes, st.integers(1, 4), schemes, options, seeds)
def test_linears_of_a_stack_are_bit_identical_to_themselves_alone(
    method: Method, sizes: list[int], groups: int, scheme: Scheme, how: SolveOptions, seed: int
) -> None:
    weight, statistics = _layer(sum(sizes), groups * scheme.group_size, seed)
    stacked = solve(method, weight, sizes, statistics, scheme, how)
    for linear, part in zip(stacked, torch.split(weight, sizes), strict=True):
        (alone,) = solve(method, part, [part.shape[0]], statistics, scheme, how)
        assert torch.equal(linear.codes_OI, alone.codes_OI)
        assert torch.equal(linear.scale_OG, alone.scale_OG)
        assert torch.equal(linear.zero_OG, alone.zero_OG)


@LAWS
@given(st.integers(1, 60), st.integers(1, 6), schemes, options, seeds)
def test_gptq_is_at_least_as_good_as_rounding_in_every_row(
    rows: int, groups: int, scheme: Scheme, how: SolveOptions, seed: int
) -> None:
    weight, statistics = _layer(rows, groups * scheme.group_size, seed)
    gptq, rtn = (
        _output_losses(
            solve(method, weight, [rows], statistics, scheme, replace(how, refinement=0))[0], weight, statistics
        )
        for method in (Method.GPTQ, Method.RTN)
    )
    assert bool((gptq <= rtn * (1 + 1e-4) + 1e-12).all())


@LAWS
@given(st.sampled_from(Method), st.integers(1, 60), st.integers(1, 6), schemes, options, seeds)
def test_refinement_makes_no_row_worse(
    method: Method, rows: int, groups: int, scheme: Scheme, how: SolveOptions, seed: int
) -> None:
    weight, statistics = _layer(rows, groups * scheme.group_size, seed)
    plain, refined = (
        _output_losses(
            solve(method, weight, [rows], statistics, scheme, replace(how, refinement=rounds))[0], weight, statistics
        )
        for rounds in (0, 3)
    )
    assert bool((refined <= plain * (1 + 1e-9) + 1e-12).all())


@LAWS
@given(st.integers(1, 30), st.integers(1, 6), schemes, seeds)
def test_diagonal_moment_makes_gptq_exactly_rounding(rows: int, groups: int, scheme: Scheme, seed: int) -> None:
    weight, statistics = _layer(rows, groups * scheme.group_size, seed)
    diagonal = Statistics(
        torch.diag(statistics.second_moment_II.diagonal()),
        statistics.abs_sum_I,
        statistics.abs_max_I,
        statistics.num_tokens,
    )
    gptq, rtn = (
        solve(method, weight, [rows], diagonal, scheme, SolveOptions())[0] for method in (Method.GPTQ, Method.RTN)
    )
    assert torch.equal(gptq.codes_OI, rtn.codes_OI)
    assert torch.equal(gptq.scale_OG, rtn.scale_OG)


@LAWS
@given(st.integers(1, 20), st.integers(1, 8), schemes, st.booleans(), st.integers(1, 200), seeds)
def test_block_size_does_not_change_the_codes(
    rows: int, groups: int, scheme: Scheme, act_order: bool, block_size: int, seed: int
) -> None:
    weight, statistics = _layer(rows, groups * scheme.group_size, seed)
    importance = channel_importance(statistics.second_moment_II.diagonal())
    scale, zero = fit_grid(weight, importance, scheme, search=True)
    found = factor(statistics.second_moment_II, 0.01, act_order)
    assert found is not None
    exact = replace(found, feedback_II=found.feedback_II.double())
    one, other = (
        columns_of(weight.double(), scale.double(), zero, scheme, exact, size).codes_OI for size in (128, block_size)
    )
    assert torch.equal(one, other)


@LAWS
@given(st.integers(1, 30), st.integers(1, 6), schemes, seeds)
def test_searched_grids_are_never_worse_and_always_storable(rows: int, groups: int, scheme: Scheme, seed: int) -> None:
    weight, statistics = _layer(rows, groups * scheme.group_size, seed)
    importance = channel_importance(statistics.second_moment_II.diagonal())
    losses = []
    for search in (True, False):
        scale, zero = fit_grid(weight, importance, scheme, search)
        assert torch.equal(storable_scale(scale), scale)
        codes = encode(weight, scale, zero, scheme).view(rows, groups, -1).double()
        rounded = scale[..., None].double() * (codes - zero[..., None].double())
        error = (rounded - weight.view(rows, groups, -1).double()).square()
        losses.append((error * importance.view(groups, -1).double()).sum(-1))
    assert bool((losses[0] <= losses[1] * (1 + 1e-4) + 1e-15).all())


@LAWS
@given(st.floats(-(2.0**127), 2.0**127, width=32), st.floats(-1, 1, width=32), schemes, st.booleans())
def test_any_finite_group_gets_a_usable_grid_and_exact_zeros(
    big: float, small: float, scheme: Scheme, search: bool
) -> None:
    weight = torch.zeros(2, scheme.group_size)
    weight[:, 0], weight[1, 1:3] = big, small
    scale, zero = fit_grid(weight, torch.ones(scheme.group_size), scheme, search)
    assert torch.equal(storable_scale(scale), scale)
    codes = encode(weight, scale, zero, scheme)
    rounded = scale.repeat_interleave(scheme.group_size, 1) * (
        codes.float() - zero.repeat_interleave(scheme.group_size, 1).float()
    )
    assert bool(rounded.isfinite().all())
    assert not rounded[weight == 0].any()


@LAWS
@given(st.integers(1, 40), st.integers(1, 6), schemes, seeds)
def test_activation_aware_scaling_never_hurts_and_keeps_the_function(
    rows: int, groups: int, scheme: Scheme, seed: int
) -> None:
    weight, statistics = _layer(rows, groups * scheme.group_size, seed)
    found = search_scales(weight, statistics, scheme, SolveOptions())
    assert found.loss_scaled <= found.loss_unscaled
    assert bool((found.scale_I > 0).all())
    moved = rescale(statistics, found.scale_I)
    before = ((weight.double() @ statistics.second_moment_II.double()) * weight.double()).sum()
    scaled = (weight * found.scale_I).double()
    after = ((scaled @ moved.second_moment_II.double()) * scaled).sum()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-12)


@LAWS
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 24), seeds)
def test_merging_slices_is_collecting_everything(slices: list[int], columns: int, seed: int) -> None:
    x = torch.randn(sum(slices), columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    whole = accumulate(empty(columns), x)
    merged = merge([accumulate(empty(columns), part) for part in torch.split(x, slices)])
    assert merged.num_tokens == whole.num_tokens
    assert torch.equal(merged.abs_max_I, whole.abs_max_I)
    torch.testing.assert_close(merged.second_moment_II, whole.second_moment_II, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(merged.abs_sum_I, whole.abs_sum_I, rtol=1e-5, atol=1e-4)
