"""The compiled loops give what the same steps in torch give, and a row's result depends on that row alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.quantize import gptq, grid, kernels
from pipeline.quantize.loss import row_losses
from pipeline.quantize.statistics import accumulate, empty
from pipeline.quantize.types import Scheme, dequantize
from tests.factories import columns_of

SCHEMES = [Scheme(bits, size, symmetric) for bits in (2, 4, 8) for size in (16, 60) for symmetric in (True, False)]


def layer(num_rows: int, num_columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5 + torch.eye(num_columns)
    x = torch.randn(1000, num_columns, generator=generator) @ mixing
    return torch.randn(num_rows, num_columns, generator=generator) * 0.03, x.t() @ x


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Afterwards ``with_torch.undo()`` goes back to the compiled loops."""
    monkeypatch.setattr(kernels, "take", lambda tensor: False)
    return monkeypatch


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["diagonal", "blocks"])
def test_grids_err_as_little_as_those_that_torch_finds(
    scheme: Scheme, kind: str, with_torch: pytest.MonkeyPatch
) -> None:
    weight, moment = layer(70, 240)
    diagonal, blocks = grid.channel_importance(moment.diagonal()), grid.block_importance(moment, scheme.group_size)
    importance = diagonal if kind == "diagonal" else blocks
    slow = grid.fit_grid(weight, importance, scheme, True)
    with_torch.undo()
    fast = grid.fit_grid(weight, importance, scheme, True)

    def losses(scale: Tensor, zero: Tensor) -> Tensor:
        codes = grid.encode(weight, scale, zero, scheme)
        delta = (dequantize(codes, scale, zero, scheme) - weight).double()
        delta = delta.view(70, -1, scheme.group_size)
        if kind == "diagonal":
            return (delta.square() * diagonal.view(-1, scheme.group_size)).sum(-1)
        return torch.einsum("rgi,gij,rgj->rg", delta, blocks.double(), delta)

    # Sums are rounded otherwise, so of two grids that err alike either may be taken; now and then another way is gone.
    same = (fast[0] == slow[0]) & (fast[1] == slow[1])
    assert same.float().mean() > 0.98
    assert torch.allclose(losses(*fast)[same], losses(*slow)[same])
    assert losses(*fast).sum() == pytest.approx(float(losses(*slow).sum()), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_plain_grids_are_those_of_torch(scheme: Scheme, with_torch: pytest.MonkeyPatch) -> None:
    weight, moment = layer(70, 240)
    weight[3] = 0.0
    weight[4] *= 1e-7
    weight[5] *= 1e9
    weight[6] = weight[6].abs()
    importance = grid.channel_importance(moment.diagonal())
    slow = grid.fit_grid(weight, importance, scheme, False)
    with_torch.undo()
    fast = grid.fit_grid(weight, importance, scheme, False)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_columns_are_rounded_as_with_torch(scheme: Scheme, with_torch: pytest.MonkeyPatch) -> None:
    weight, moment = layer(70, 240)
    scale, zero = grid.fit_grid(weight, grid.channel_importance(moment.diagonal()), scheme, True)
    factored = gptq.factor(moment, 0.01, act_order=True)
    assert factored is not None
    slow = columns_of(weight, scale, zero, scheme, factored)
    with_torch.undo()
    fast = columns_of(weight, scale, zero, scheme, factored)
    assert bool(slow.is_finite_O.all())
    assert bool(fast.is_finite_O.all())
    # At a near tie another code is taken, and what follows in that row makes up for another error.
    assert (fast.codes_OI == slow.codes_OI).float().mean() > 0.98
    assert float(fast.loss_O.sum()) == pytest.approx(float(slow.loss_O.sum()), rel=5e-3)
    for solved in (fast, slow):
        delta = dequantize(solved.codes_OI, scale, zero, scheme) - weight
        torch.testing.assert_close(solved.loss_O, row_losses(delta, moment), rtol=1e-4, atol=0)
        torch.testing.assert_close(solved.error_norm_O, delta.double().square().sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", [Scheme(4, 60, True), Scheme(3, 16, False)], ids=str)
def test_a_row_alone_is_what_it_is_among_others(scheme: Scheme) -> None:
    weight, moment = layer(2 * kernels.LANES + 7, 240)
    for importance in (grid.channel_importance(moment.diagonal()), grid.block_importance(moment, scheme.group_size)):
        scale, zero = grid.fit_grid(weight, importance, scheme, True)
        for row in (0, 1, 63, 64, 130, 134):
            alone = grid.fit_grid(weight[row : row + 1].contiguous(), importance, scheme, True)
            assert torch.equal(alone[0][0], scale[row])
            assert torch.equal(alone[1][0], zero[row])
    factored = gptq.factor(moment, 0.01, act_order=True)
    assert factored is not None
    # One block, so that no matrix product of another shape is among the steps.
    solved = columns_of(weight, scale, zero, scheme, factored, block_size=240)
    for row in (0, 63, 64, 134):
        rows = slice(row, row + 1)
        alone = columns_of(weight[rows].contiguous(), scale[rows], zero[rows], scheme, factored, block_size=240)
        assert torch.equal(alone.codes_OI[0], solved.codes_OI[row])
        assert float(alone.loss_O[0]) == float(solved.loss_O[row])


def test_rows_that_overflow_are_said_to() -> None:
    weight, moment = layer(70, 240)
    weight[9, 5] = torch.inf
    scheme = Scheme(4, 60, True)
    scale, zero = torch.full((70, 4), 0.01), torch.full((70, 4), 8, dtype=torch.uint8)
    factored = gptq.factor(moment, 0.01, act_order=True)
    assert factored is not None
    is_finite = columns_of(weight, scale, zero, scheme, factored).is_finite_O
    assert is_finite.tolist() == [row != 9 for row in range(70)]


@pytest.mark.parametrize("width", [1, 191, 192, 193, 400])
def test_halves_of_symmetric_products_make_the_whole(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    parts = [torch.randn(size, width, generator=generator) for size in (7, 1, 40)]
    statistics = empty(width)
    for part in parts:
        statistics = accumulate(statistics, part)
    x = torch.cat(parts).double()
    moment = statistics.second_moment_II
    assert torch.allclose(moment.double(), x.t() @ x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(moment, moment.t(), rtol=1e-6, atol=1e-6)
    delta = torch.randn(9, width, generator=generator)
    wanted = (delta.double() @ moment.double() * delta.double()).sum(-1)
    assert torch.allclose(row_losses(delta, moment), wanted, rtol=1e-4)
