"""Numbers of 8 bits against their definition, and grids of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.quantize import float8, float_grid, kernels
from pipeline.quantize.grid import channel_importance, clipping, encode, fit_grid
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.storable import MIN_SCALE, storable_scale
from pipeline.quantize.types import Scheme, dequantize
from pipeline.spec import Activations, Method, NumberType
from tests.unit.quantize.conftest import Layer


def scheme_of(columns: int) -> Scheme:
    return Scheme(8, columns, True, NumberType.FLOAT, Activations.DYNAMIC)


def number(code: int) -> float:
    """Return the number of a bit pattern, from the definition of E4M3."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -size if sign else size


PATTERNS = [code for code in range(256) if code & 0x7F != 0x7F]
NUMBERS = torch.tensor([number(code) for code in PATTERNS])


def test_all_patterns_are_the_numbers_of_the_definition() -> None:
    codes = torch.tensor(PATTERNS, dtype=torch.uint8)
    assert torch.equal(float8.decode(codes), NUMBERS)
    assert torch.equal(float8.encode(NUMBERS), codes)
    assert float(NUMBERS.max()) == float8.MAX_NUMBER
    assert float(NUMBERS[NUMBERS > 0].min()) == float8.MIN_NORMAL / 8


def test_rounding_takes_the_nearest_number_and_the_even_one_of_two() -> None:
    between = torch.unique(NUMBERS)
    ties = (between[1:] + between[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    some = torch.cat(
        [ties, torch.randn(4000, generator=generator) * 2.0 ** torch.randint(-9, 9, (4000,), generator=generator)]
    )
    rounded = float8.round_(some.clone())
    distance = (some.clamp(-448, 448)[:, None].double() - between.double()).abs()
    assert torch.equal((some.clamp(-448, 448).double() - rounded.double()).abs(), distance.amin(-1))
    assert bool((float8.encode(ties) % 2 == 0).all())
    assert torch.equal(float8.decode(float8.encode(some)), rounded)
    assert float8.round_(torch.tensor([1e9, -1e9])).tolist() == [448.0, -448.0]


def losses(weight: Tensor, scale: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    zero = torch.zeros_like(scale, dtype=torch.uint8)
    rounded = dequantize(encode(weight, scale, zero, scheme), scale, zero, scheme)
    return ((rounded - weight).double().square() * importance).sum(-1)


def test_a_searched_scale_never_loses_to_one_that_clips_nothing_and_is_near_the_best_there_is(layer: Layer) -> None:
    weight, statistics = layer(40, 96)
    scheme, importance = scheme_of(96), channel_importance(statistics.second_moment_II.diagonal())
    plain, zero = fit_grid(weight, importance, scheme, search=False)
    found, _ = fit_grid(weight, importance, scheme, search=True)
    assert torch.equal(storable_scale(found), found)
    assert not zero.any()
    spanning = weight.abs().amax(-1, keepdim=True) / 448
    assert bool((plain >= spanning).all())
    assert float((plain / spanning).max()) < 1.01
    plain_losses, found_losses = (losses(weight, scale, importance, scheme) for scale in (plain, found))
    assert bool((found_losses <= plain_losses).all())
    tried = [losses(weight, storable_scale(spanning * 2.0 ** (k / 64)), importance, scheme) for k in range(-80, 80)]
    best = torch.stack(tried).amin(0)
    assert float(found_losses.sum()) < 0.9 * float(plain_losses.sum())
    assert bool((found_losses <= 1.03 * best).all())


@pytest.mark.parametrize("rows", [1, 64, 70])
def test_the_compiled_search_is_that_of_torch_and_rows_are_alone(
    rows: int, layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = layer(rows, 96)
    weight[-1] *= 1e-4  # most of it are numbers below the smallest normal one, at a scale that is held
    importance = channel_importance(statistics.second_moment_II.diagonal())
    fast = float_grid.fit_float_scales(weight, importance, 48, search=True)
    alone = [float_grid.fit_float_scales(row[None], importance, 48, search=True) for row in weight]
    assert torch.equal(torch.cat(alone), fast)
    monkeypatch.setattr(kernels, "take", lambda tensor: False)
    slow = float_grid.fit_float_scales(weight, importance, 48, search=True)
    assert float((fast == slow).float().mean()) > 0.95
    scheme = Scheme(8, 48, True, NumberType.FLOAT, Activations.DYNAMIC)
    assert torch.allclose(*(losses(weight, scale, importance, scheme) for scale in (fast, slow)), rtol=1e-5)


def test_weights_on_a_grid_are_found_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.tensor(PATTERNS, dtype=torch.uint8)[torch.randint(0, 254, (12, 64), generator=generator)]
    codes[:, 0] = 0x7E
    scale = storable_scale(torch.rand(12, 1, generator=generator) + 0.01)
    zero, scheme = torch.zeros(12, 1, dtype=torch.uint8), scheme_of(64)
    weight = dequantize(codes, scale, zero, scheme)
    for search in (False, True):
        found, _ = fit_grid(weight, torch.ones(64), scheme, search)
        assert torch.equal(dequantize(encode(weight, found, zero, scheme), found, zero, scheme), weight)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7, 3e38])
def test_degenerate_rows_get_usable_scales(value: float) -> None:
    weight, scheme = torch.zeros(3, 32), scheme_of(32)
    weight[0, 7] = value
    scale, zero = fit_grid(weight, torch.ones(32), scheme, search=True)
    assert bool((scale >= MIN_SCALE).all())
    rounded = dequantize(encode(weight, scale, zero, scheme), scale, zero, scheme)
    assert bool(rounded.isfinite().all())
    assert not rounded[1:].any()


def test_only_scales_far_too_small_or_too_large_count_as_held() -> None:
    largest = torch.tensor([[0.0], [448 * MIN_SCALE / 17], [448 * MIN_SCALE / 15], [1.0], [3e38]])
    found = clipping(largest.expand(5, 16).contiguous(), torch.full((5, 1), MIN_SCALE), scheme_of(16))
    assert found.num_below_O.tolist() == [0, 1, 0, 0, 0]
    assert found.num_above_O.tolist() == [0, 0, 0, 0, 1]


def test_solving_rounds_each_row_by_itself_and_reports_its_loss(layer: Layer) -> None:
    weight, statistics = layer(40, 96)
    linears = solve(Method.RTN, weight, [16, 24], statistics, scheme_of(96), SolveOptions())
    alone = solve(Method.RTN, weight[16:].contiguous(), [24], statistics, scheme_of(96), SolveOptions())
    assert torch.equal(linears[1].codes_OI, alone[0].codes_OI)
    assert torch.equal(linears[1].scale_OG, alone[0].scale_OG)
    delta = (alone[0].dequantize() - weight[16:]).double()
    moment = statistics.second_moment_II.double()
    expected = float(((delta @ moment) * delta).sum()) / statistics.num_tokens
    assert alone[0].report.loss == pytest.approx(expected, rel=1e-4)
    assert 0.01 < alone[0].report.weight_error < 2**-4
    assert alone[0].report.degradations == ()
