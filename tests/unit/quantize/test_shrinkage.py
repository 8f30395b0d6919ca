"""How much of the correlations of inputs is chance, and that solving without it serves other tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.quantize.shrinkage import ROWS, estimate_shrinkage, shrink
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.statistics import accumulate, empty, merge, rescale
from pipeline.quantize.types import Scheme, Statistics
from pipeline.spec import Method

seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 3, 17, 64])


def tokens(seed: int, count: int, width: int, *, strength: float = 1.0) -> Tensor:
    """Return tokens [count, width] with correlated channels of different sizes; the seed is that of the tokens."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    sizes_I = torch.logspace(-2, 1, width)
    own = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return (own + strength * own @ mixing / width**0.5) * sizes_I


def sums(x_TI: Tensor) -> Statistics:
    return accumulate(empty(x_TI.shape[1]), x_TI)


def oracle(first: Statistics, second: Statistics) -> float:
    """The same entry by entry in float64."""
    n, m = first.num_tokens, second.num_tokens
    one, other = first.second_moment_II.double(), second.second_moment_II.double()
    diagonal = (one + other).diagonal()
    variance, square = 0.0, 0.0
    for i in range(len(diagonal)):
        for j in range(len(diagonal)):
            size = float((diagonal[i] * diagonal[j]).sqrt())
            if i != j and size > 0:
                a, b = float(one[i, j]) / size, float(other[i, j]) / size
                variance += n * m * (a / n - b / m) ** 2
                square += (a + b) ** 2
    return min(1.0, variance / square) if square else 0.0


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, st.integers(1, 40), st.integers(1, 40))
def test_the_share_is_what_the_formula_says_whichever_half_comes_first(seed: int, width: int, n: int, m: int) -> None:
    x_TI = tokens(seed, n + m, width)
    first, second = sums(x_TI[:n]), sums(x_TI[n:])
    share = estimate_shrinkage(first, second)
    assert 0.0 <= share <= 1.0
    assert share == pytest.approx(oracle(first, second), rel=1e-3, abs=1e-6)
    assert share == pytest.approx(estimate_shrinkage(second, first), rel=1e-5)


def test_wide_inputs_are_looked_at_in_parts() -> None:
    x_TI = tokens(0, 200, ROWS + 37)
    first, second = sums(x_TI[:120]), sums(x_TI[120:])
    one, other = (half.second_moment_II.double() for half in (first, second))
    size = (one + other).diagonal().sqrt()
    a, b = one / size / size[:, None], other / size / size[:, None]
    is_off = ~torch.eye(len(size), dtype=torch.bool)
    expected = 120 * 80 * (a / 120 - b / 80)[is_off].square().sum() / (a + b)[is_off].square().sum()
    assert estimate_shrinkage(first, second) == pytest.approx(float(expected), rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_dividing_inputs_by_scales_changes_nothing(seed: int) -> None:
    x_TI = tokens(seed, 90, 24)
    scale_I = torch.rand(24, generator=torch.Generator().manual_seed(seed)) * 10 + 0.1
    halves = sums(x_TI[:50]), sums(x_TI[50:])
    scaled = (rescale(half, scale_I) for half in halves)
    assert estimate_shrinkage(*scaled) == pytest.approx(estimate_shrinkage(*halves), rel=1e-4)


def test_halves_that_agree_leave_everything_and_pure_chance_leaves_nothing() -> None:
    x_TI = tokens(1, 64, 32)
    assert estimate_shrinkage(sums(x_TI), sums(x_TI)) == 0.0
    noise_TI = torch.randn(400, 64, generator=torch.Generator().manual_seed(2))
    assert estimate_shrinkage(sums(noise_TI[:200]), sums(noise_TI[200:])) > 0.9


def test_inputs_that_were_never_there_and_halves_without_tokens_tell_nothing() -> None:
    x_TI = tokens(3, 60, 20)
    halves = sums(x_TI[:30]), sums(x_TI[30:])
    share = estimate_shrinkage(*halves)
    with_dead = (sums(torch.nn.functional.pad(half, (0, 4))) for half in (x_TI[:30], x_TI[30:]))
    assert estimate_shrinkage(*with_dead) == pytest.approx(share, rel=1e-6)
    assert estimate_shrinkage(empty(20), halves[0]) == estimate_shrinkage(halves[0], empty(20)) == 0.0
    assert estimate_shrinkage(sums(torch.zeros(3, 20)), sums(torch.zeros(3, 20))) == 0.0


def test_what_is_not_finite_is_left_to_who_names_it() -> None:
    x_TI = tokens(3, 60, 20)
    broken = x_TI.clone()
    broken[0, 0] = float("inf")
    assert estimate_shrinkage(sums(x_TI), sums(broken)) == 0.0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_shrinking_keeps_the_diagonal_and_takes_its_share_off_the_rest(share: float) -> None:
    statistics = sums(tokens(4, 50, 16))
    before = statistics.second_moment_II.clone()
    shrunk = shrink(statistics, share)
    assert shrunk.shrinkage == share
    assert torch.equal(shrunk.second_moment_II.diagonal(), before.diagonal())
    is_off = ~torch.eye(16, dtype=torch.bool)
    torch.testing.assert_close(shrunk.second_moment_II[is_off], before[is_off] * (1 - share))
    assert (shrunk.num_tokens, shrunk.abs_sum_I is statistics.abs_sum_I) == (50, True)


def correlations(moment_II: Tensor) -> Tensor:
    size_I = moment_II.diagonal().double().sqrt()
    return (moment_II / size_I / size_I[:, None]).fill_diagonal_(0.0)


@pytest.mark.parametrize("count", [100, 300, 1000])
def test_the_share_is_on_average_the_one_that_leaves_the_least_error(count: int) -> None:
    # 100,000 tokens stand for all there are.
    true_II = correlations(sums(tokens(12345, 100_000, 48)).second_moment_II)
    best, found = [], []
    for seed in range(12):
        x_TI = tokens(seed, count, 48)
        halves = sums(x_TI[: count // 2]), sums(x_TI[count // 2 :])
        own_II = correlations(merge(halves).second_moment_II)
        best.append(1 - float((own_II * true_II).sum() / own_II.square().sum()))
        found.append(estimate_shrinkage(*halves))
    assert sum(found) / 12 == pytest.approx(sum(best) / 12, rel=0.25)


def noisy(seed: int, count: int) -> Tensor:
    """Return tokens of 64 channels that follow from a few, with much that is in none: what is there of a direction
    beside the strongest is mostly chance."""
    loads = torch.randn(4, 64, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -1, 4)[:, None]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator) @ loads + torch.randn(count, 64, generator=generator)


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_found_without_chance_err_less_on_other_tokens(bits: int) -> None:
    everything_II = sums(noisy(99, 50_000)).second_moment_II.double()
    gains = []
    for seed in range(8):
        x_TI = noisy(seed, 160)
        weight_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        halves = sums(x_TI[:80]), sums(x_TI[80:])
        losses = []
        for share in (0.0, estimate_shrinkage(*halves)):
            statistics = shrink(merge(halves), share)
            (linear,) = solve(Method.GPTQ, weight_OI, [64], statistics, Scheme(bits, 16, True), SolveOptions())
            assert linear.report.shrinkage == share
            error_OI = (linear.dequantize() - weight_OI).double()
            losses.append(float(((error_OI @ everything_II) * error_OI).sum()))
        gains.append(losses[1] / losses[0])
    assert max(gains) < 1.0
    assert sum(gains) / len(gains) < 0.98


@pytest.mark.parametrize("method", [Method.GPTQ, Method.RTN, Method.AWQ])
@pytest.mark.parametrize("refinement", [0, 2])
def test_losses_are_of_the_tokens_as_they_were(method: Method, refinement: int) -> None:
    x_TI = noisy(3, 200)
    weight_OI = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    moment_II = sums(x_TI).second_moment_II.double()
    options, scheme = SolveOptions(refinement=refinement), Scheme(4, 16, False)
    (linear,) = solve(method, weight_OI, [40], shrink(sums(x_TI), 0.3), scheme, options)
    error_OI, wide_OI = (linear.dequantize() - weight_OI).double(), weight_OI.double()
    loss, energy = (float(((rows_OI @ moment_II) * rows_OI).sum()) for rows_OI in (error_OI, wide_OI))
    assert linear.report.loss == pytest.approx(loss / 200, rel=1e-4)
    assert linear.report.relative_error == pytest.approx((loss / energy) ** 0.5, rel=1e-4)


def test_where_all_was_taken_off_the_loss_is_of_the_diagonal() -> None:
    x_TI = noisy(3, 200)
    weight_OI = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    (linear,) = solve(Method.GPTQ, weight_OI, [40], shrink(sums(x_TI), 1.0), Scheme(4, 16, False), SolveOptions())
    error_OI = (linear.dequantize() - weight_OI).double()
    loss = float((error_OI.square() * x_TI.double().square().sum(0)).sum())
    assert linear.report.loss == pytest.approx(loss / 200, rel=1e-4)
