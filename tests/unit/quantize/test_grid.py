"""Grids: storable scales, ranges, the search against brute force, and groups that degenerate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.quantize.grid import block_importance, channel_importance, encode, fit_grid
from pipeline.quantize.storable import MAX_SCALE, MIN_SCALE, storable_scale
from pipeline.quantize.types import Scheme, dequantize

SCHEMES = [Scheme(bits, 16, symmetric) for bits in (2, 3, 4, 5, 6, 8) for symmetric in (True, False)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _is_storable(scale: Tensor) -> bool:
    exact = all(torch.equal(scale.to(dtype).float(), scale) for dtype in (torch.float16, torch.bfloat16))
    return exact and bool((scale >= 2.0**-14).all())


def _all_storable() -> Tensor:
    significands = torch.arange(128, 256, dtype=torch.float64)
    scales = torch.cat([significands * 2.0**e for e in range(-21, 9)])
    return scales[(scales >= MIN_SCALE) & (scales <= MAX_SCALE)].float()


def _losses(weight: Tensor, scale: Tensor, zero: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    """Return float64 [O, G], by the definition."""
    rounded = dequantize(encode(weight, scale, zero, scheme), scale, zero, scheme)
    delta = (rounded.double() - weight.double()).square() * importance.double()
    return delta.view(weight.shape[0], -1, scheme.group_size).sum(-1)


def test_storable_scales_are_exact_in_both_half_types_and_nearest() -> None:
    every = _all_storable()
    wished = torch.cat([every, every * 1.003, _random(500).abs() * 0.01])
    wished = wished.clamp(MIN_SCALE, MAX_SCALE)
    nearest = storable_scale(wished)
    assert _is_storable(nearest)
    distance = (every[None, :] - wished[:, None]).abs().amin(1)
    assert torch.equal((nearest - wished).abs(), distance)


def test_rounding_up_gives_the_next_storable_scale() -> None:
    every = _all_storable()
    wished = (_random(500).abs() * 0.01).clamp(MIN_SCALE, MAX_SCALE)
    up = storable_scale(wished, round_up=True)
    expected = torch.stack([every[every >= value].amin() for value in wished])
    assert torch.equal(up, expected)
    assert torch.equal(storable_scale(every, round_up=True), every)


def test_scales_outside_float16_are_brought_inside() -> None:
    for round_up in (False, True):
        got = storable_scale(torch.tensor([0.0, 1e-30, 1e9, float("inf")]), round_up=round_up)
        assert got.tolist() == [MIN_SCALE, MIN_SCALE, MAX_SCALE, MAX_SCALE]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_spanning_grid_clips_nothing(scheme: Scheme) -> None:
    weight = _random(40, 64)
    scale, zero = fit_grid(weight, torch.ones(64), scheme, search=False)
    rounded = dequantize(encode(weight, scale, zero, scheme), scale, zero, scheme)
    half_step = scale.repeat_interleave(16, 1) / 2
    # An asymmetric zero point is rounded itself, which can cost the ends another half step.
    allowed = half_step * (1 if scheme.symmetric else 2)
    assert bool(((rounded - weight).abs() <= allowed * (1 + 1e-5)).all())
    assert _is_storable(scale)


def _outlier_weight() -> tuple[Tensor, Tensor]:
    weight = _random(24, 64) * 0.05
    weight[torch.arange(24), torch.arange(24)] *= 4
    return weight, channel_importance(_random(64, seed=3).square() + 0.01)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_never_loses_to_spanning_and_mostly_wins(scheme: Scheme) -> None:
    weight, importance = _outlier_weight()
    found = fit_grid(weight, importance, scheme, search=True)
    spanning = fit_grid(weight, importance, scheme, search=False)
    assert _is_storable(found[0])
    loss, plain_loss = (_losses(weight, *grid, importance, scheme) for grid in (found, spanning))
    assert bool((loss <= plain_loss * (1 + 1e-5)).all())
    assert loss.sum() < 0.9 * plain_loss.sum()


@pytest.mark.parametrize(("symmetric", "slack"), [(True, 1.05), (False, 1.15)])
def test_search_comes_near_brute_force_over_every_scale_and_zero_point(symmetric: bool, slack: float) -> None:
    scheme = Scheme(4, 32, symmetric)
    weight, importance = _outlier_weight()
    loss = _losses(weight, *fit_grid(weight, importance, scheme, search=True), importance, scheme)
    best = _brute_force(weight, importance, scheme)
    assert bool((loss >= best * (1 - 1e-5)).all())
    assert loss.sum() <= best.sum() * slack


def _brute_force(weight: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    """Return float64 [O, G]: the least loss over every storable scale and every zero point."""
    top = float(weight.abs().max()) * 2.4 / scheme.max_code
    best = torch.full((weight.shape[0], weight.shape[1] // scheme.group_size), float("inf"), dtype=torch.float64)
    for scale in (s for s in _all_storable().tolist() if top / 30 <= s <= top):
        for zero in [scheme.middle] if scheme.symmetric else range(scheme.max_code + 1):
            grid = torch.full(best.shape, scale), torch.full(best.shape, zero, dtype=torch.uint8)
            best = torch.minimum(best, _losses(weight, *grid, importance, scheme))
    return best


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_that_lie_on_a_grid_are_found_exactly(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(5)
    low = -scheme.middle if scheme.symmetric else 0
    codes = torch.randint(low, low + scheme.max_code + 1, (30, 32), generator=generator)
    codes.view(30, 2, 16)[:, :, 0], codes.view(30, 2, 16)[:, :, 1] = low, low + scheme.max_code
    scale = storable_scale(torch.rand(30, 2, generator=generator) * 0.01 + 0.001)
    weight = codes * scale.repeat_interleave(16, 1)
    found_scale, found_zero = fit_grid(weight, torch.ones(32), scheme, search=True)
    rounded = dequantize(encode(weight, found_scale, found_zero, scheme), found_scale, found_zero, scheme)
    assert torch.equal(rounded, weight)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "value", [0.0, 1.0, -1.0, 1e-40, -1e-7, 1e6, -1e30, 3e38], ids=lambda value: f"constant {value}"
)
def test_degenerate_groups_get_usable_scales_and_exact_zeros(value: float, scheme: Scheme, search: bool) -> None:
    weight = torch.zeros(3, 32)
    weight[0] = value
    weight[1, 3] = value
    scale, zero = fit_grid(weight, torch.ones(32), scheme, search)
    assert _is_storable(scale)
    codes = encode(weight, scale, zero, scheme)
    assert int(codes.max()) <= scheme.max_code
    rounded = dequantize(codes, scale, zero, scheme)
    assert bool(rounded.isfinite().all())
    assert not rounded[weight == 0].any()
    if abs(value) == 1.0:
        torch.testing.assert_close(rounded, weight, rtol=0.01, atol=0)


def test_mixed_extremes_in_one_group_stay_finite() -> None:
    weight = torch.tensor([[3e38, -3e38, 1e-38, 0.0] * 4])
    for scheme in SCHEMES:
        scale, zero = fit_grid(weight, torch.ones(16), scheme, search=True)
        assert _is_storable(scale)
        assert float(dequantize(encode(weight, scale, zero, scheme), scale, zero, scheme)[0, 3]) == 0.0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_block_importance_that_is_diagonal_gives_the_diagonal_result(scheme: Scheme) -> None:
    weight = _random(20, 32)
    moment = torch.diag(_random(32, seed=7).square() + 0.1)
    blocks = block_importance(moment, 16)
    diagonal = blocks.diagonal(dim1=1, dim2=2).reshape(-1)
    by_blocks = fit_grid(weight, blocks, scheme, search=True)
    by_diagonal = fit_grid(weight, diagonal, scheme, search=True)
    torch.testing.assert_close(
        _losses(weight, *by_blocks, diagonal, scheme),
        _losses(weight, *by_diagonal, diagonal, scheme),
        rtol=1e-4,
        atol=0,
    )


def test_block_importance_is_the_diagonal_blocks_of_the_moment() -> None:
    x = _random(50, 6)
    moment = x.t() @ x
    blocks = block_importance(moment, 3) * moment.diagonal().mean()
    torch.testing.assert_close(blocks[0], moment[:3, :3] + 1e-3 * moment.diagonal().mean() * torch.eye(3))
    torch.testing.assert_close(blocks[1], moment[3:, 3:] + 1e-3 * moment.diagonal().mean() * torch.eye(3))


def test_importance_of_nothing_alive_is_uniform() -> None:
    assert torch.equal(channel_importance(torch.zeros(4)), torch.ones(4))
    assert torch.equal(block_importance(torch.zeros(4, 4), 2), torch.eye(2).repeat(2, 1, 1))
