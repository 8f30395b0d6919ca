"""Refinement against a slow oracle: what it leaves cannot be made better by one step, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.quantize import kernels
from pipeline.quantize.refine import FoundRows, refine_rows
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.storable import storable_scale
from pipeline.quantize.types import QuantizedLinear, Scheme, Statistics, dequantize
from pipeline.spec import Method

Layer = Callable[..., tuple[Tensor, Statistics]]
SCHEMES = [Scheme(2, 16, False), Scheme(3, 32, True), Scheme(4, 192, False), Scheme(4, 16, True), Scheme(8, 64, False)]
DAMPING = 1e-5


def found_of(linear: QuantizedLinear, weight_OI: Tensor, second_moment_II: Tensor) -> FoundRows:
    delta_OI = (linear.dequantize() - weight_OI).double()
    loss_O = ((delta_OI @ second_moment_II.double()) * delta_OI).sum(-1)
    grids = linear.codes_OI, linear.scale_OG, linear.zero_OG
    return FoundRows(*grids, loss_O, delta_OI.square().sum(-1), torch.zeros(len(loss_O), dtype=torch.int64))


def damped_losses(found: FoundRows, weight_OI: Tensor, second_moment_II: Tensor, scheme: Scheme) -> Tensor:
    moment_II = second_moment_II.double()
    moment_II = moment_II + DAMPING * moment_II.diagonal().mean() * torch.eye(len(moment_II))
    delta_OI = dequantize(found.codes_OI, found.scale_OG, found.zero_OG, scheme).double() - weight_OI
    return ((delta_OI @ moment_II) * delta_OI).sum(-1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", [Method.RTN, Method.GPTQ])
def test_what_is_found_errs_less_and_says_how_much(layer: Layer, method: Method, scheme: Scheme) -> None:
    weight, statistics = layer(24, 192)
    plain, refined = (
        solve(method, weight, [24], statistics, scheme, SolveOptions(refinement=rounds))[0] for rounds in (0, 8)
    )
    delta = (refined.dequantize() - weight).double()
    losses = ((delta @ statistics.second_moment_II.double()) * delta).sum(-1)
    assert refined.report.loss == pytest.approx(float(losses.sum()) / statistics.num_tokens, rel=1e-6)
    assert refined.report.weight_error == pytest.approx(float(delta.norm() / weight.double().norm()), rel=1e-5)
    # Rounding to nearest has the most to gain; at 8 bits GPTQ leaves next to nothing.
    assert refined.report.loss < (0.97 if scheme.bits < 8 or method is Method.RTN else 1.0) * plain.report.loss
    assert 1 <= refined.report.num_rounds <= 8
    assert plain.report.num_rounds == 0
    assert torch.equal(refined.scale_OG, storable_scale(refined.scale_OG))
    assert int(refined.codes_OI.max()) <= scheme.max_code
    if scheme.symmetric:
        assert bool((refined.zero_OG == scheme.middle).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_single_step_makes_it_better(layer: Layer, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code one up or down, every scale's storable neighbours, every zero point one up or down."""
    monkeypatch.setattr("pipeline.quantize.refine.LEAST_GAIN", 0.0)
    weight, statistics = layer(6, 192)
    moment = statistics.second_moment_II
    (rounded,) = solve(Method.RTN, weight, [6], statistics, scheme, SolveOptions())
    # Rounds that are taken lower the loss without damping, so with next to none what is left is a minimum of both.
    refined = refine_rows(weight, found_of(rounded, weight, moment), moment, scheme, DAMPING, 200)
    least = damped_losses(refined, weight, moment, scheme)

    def gain(**changes: Tensor) -> float:
        return float((1 - damped_losses(replace(refined, **changes), weight, moment, scheme) / least).max())

    gains = []
    codes = refined.codes_OI.to(torch.int64)
    for column in range(weight.shape[1]):
        for step in (-1, 1):
            changed = codes.clone()
            changed[:, column] = (changed[:, column] + step).clamp(0, scheme.max_code)
            gains.append(gain(codes_OI=changed.to(torch.uint8)))
    bits = refined.scale_OG.view(torch.int32)
    for group in range(refined.scale_OG.shape[1]):
        for step in (-1, 1):
            neighbour = bits.clone()
            neighbour[:, group] += step << 16
            gains.append(gain(scale_OG=storable_scale(neighbour.view(torch.float32))))
            if not scheme.symmetric:
                zero = refined.zero_OG.to(torch.int64)
                zero[:, group] = (zero[:, group] + step).clamp(0, scheme.max_code)
                gains.append(gain(zero_OG=zero.to(torch.uint8)))
    assert max(gains) < 2e-3
    assert float((least / damped_losses(found_of(rounded, weight, moment), weight, moment, scheme)).max()) < 0.95


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_compiled_loop_does_what_torch_does(layer: Layer, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer(70, 192)
    moment = statistics.second_moment_II
    (rounded,) = solve(Method.RTN, weight, [70], statistics, scheme, SolveOptions())
    found = found_of(rounded, weight, moment)
    fast = refine_rows(weight, found, moment, scheme, DAMPING, 1)
    monkeypatch.setattr(kernels, "take", lambda tensor: False)
    slow = refine_rows(weight, found, moment, scheme, DAMPING, 1)
    # Sums are rounded otherwise, so what lies between two codes may go to either; most rows are the same throughout.
    assert (fast.codes_OI == slow.codes_OI).float().mean() > 0.98
    assert float(fast.loss_O.sum()) == pytest.approx(float(slow.loss_O.sum()), rel=1e-3)


def test_inputs_that_were_never_alive_keep_what_was_found(layer: Layer) -> None:
    weight, statistics = layer(8, 64)
    scheme = Scheme(4, 16, False)
    moment = statistics.second_moment_II.clone()
    moment[:20], moment[:, :20] = 0.0, 0.0
    some = replace(statistics, second_moment_II=moment)
    (refined,) = solve(Method.GPTQ, weight, [8], some, scheme, SolveOptions(refinement=5))
    (nearest,) = solve(Method.RTN, weight, [8], some, scheme, SolveOptions())
    # Only damping pulls at them: they stay the nearest codes of their grids.
    delta = (refined.dequantize() - weight)[:, :16].abs()
    assert bool((delta <= (nearest.dequantize() - weight)[:, :16].abs().amax() * 1.5).all())
    silent = replace(statistics, second_moment_II=torch.zeros_like(moment))
    plain, none = (
        solve(Method.RTN, weight, [8], silent, scheme, SolveOptions(refinement=rounds))[0] for rounds in (0, 5)
    )
    assert torch.equal(plain.codes_OI, none.codes_OI)
    assert none.report.num_rounds == 0
