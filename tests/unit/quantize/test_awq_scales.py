"""Activation-aware scales help, never hurt, and keep the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize.awq import scales_for, search_scales
from pipeline.quantize.grid import channel_importance, fit_grid
from pipeline.quantize.rtn import round_rows
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.statistics import rescale
from pipeline.quantize.types import Scheme, Statistics, dequantize
from pipeline.spec import Method

Layer = Callable[..., tuple[Tensor, Statistics]]
SCHEME = Scheme(4, 32, False)


def _output_loss(weight: Tensor, scale: Tensor, statistics: Statistics, search: bool) -> float:
    """Return the mean squared output error of rounding (weight * scale), by the definition, in float64."""
    scaled = weight * scale
    moment = statistics.second_moment_II
    importance = channel_importance(moment.diagonal() / scale.square())
    codes, grid_scale, zero = round_rows(scaled, importance, SCHEME, search)
    delta = dequantize(codes, grid_scale, zero, SCHEME).double() / scale.double() - weight.double()
    return float(((delta @ moment.double()) * delta).sum()) / statistics.num_tokens


@pytest.mark.parametrize("clip_search", [True, False])
def test_losses_are_those_of_the_rounded_outputs(layer: Layer, clip_search: bool) -> None:
    weight, statistics = layer(64, 96)
    found = search_scales(weight, statistics, SCHEME, SolveOptions(clip_search=clip_search))
    unscaled = _output_loss(weight, torch.ones(96), statistics, clip_search)
    scaled = _output_loss(weight, found.scale_I, statistics, clip_search)
    assert found.loss_unscaled == pytest.approx(unscaled, rel=1e-3)
    assert found.loss_scaled == pytest.approx(scaled, rel=1e-3)
    assert found.loss_scaled < 0.95 * found.loss_unscaled
    assert 0 < found.exponent <= 1


def test_exponent_is_the_best_of_a_dense_sweep_or_close(layer: Layer) -> None:
    weight, statistics = layer(64, 96)
    found = search_scales(weight, statistics, SCHEME, SolveOptions(clip_search=False))
    mean = statistics.abs_sum_I / statistics.num_tokens
    sweep = [_output_loss(weight, scales_for(mean, k / 50), statistics, False) for k in range(51)]
    assert found.loss_scaled <= min(sweep) * 1.03


def test_scaling_that_cannot_help_is_left_alone(layer: Layer) -> None:
    weight, statistics = layer(32, 96)
    # Weights that lie on the unscaled grid already: any scaling adds error.
    scale, zero = fit_grid(weight, torch.ones(96), SCHEME, search=False)
    on_grid = dequantize(round_rows(weight, torch.ones(96), SCHEME, False)[0], scale, zero, SCHEME)
    found = search_scales(on_grid, statistics, SCHEME, SolveOptions(clip_search=True))
    assert found.exponent == 0.0
    assert torch.equal(found.scale_I, torch.ones(96))
    assert found.loss_scaled == found.loss_unscaled


def test_scales_are_centred_positive_and_bounded_even_for_dead_channels(layer: Layer) -> None:
    _, statistics = layer(8, 96)
    mean = statistics.abs_sum_I.clone()
    mean[5] = 0.0
    for exponent in (0.25, 1.0):
        scale = scales_for(mean, exponent)
        assert bool((scale > 0).all())
        assert float(scale.amin() * scale.amax()) == pytest.approx(1.0, rel=1e-5)
        assert float(scale.amax()) < 1e4
    assert torch.equal(scales_for(mean, 0.0), torch.ones(96))
    assert torch.equal(scales_for(torch.zeros(96), 0.5), torch.ones(96))


def test_change_of_basis_keeps_loss_and_energy(layer: Layer) -> None:
    weight, statistics = layer(32, 96)
    found = search_scales(weight, statistics, SCHEME, SolveOptions())
    scaled_weight, scaled_statistics = weight * found.scale_I, rescale(statistics, found.scale_I)
    (linear,) = solve(Method.AWQ, scaled_weight, [32], scaled_statistics, SCHEME, SolveOptions())
    delta = linear.dequantize().double() / found.scale_I.double() - weight.double()
    loss = float(((delta @ statistics.second_moment_II.double()) * delta).sum()) / statistics.num_tokens
    assert linear.report.loss == pytest.approx(loss, rel=1e-3)
    assert linear.report.loss < found.loss_unscaled


def test_sampled_rows_choose_as_well_as_all_rows(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer(300, 96)
    full = search_scales(weight, statistics, SCHEME, SolveOptions(clip_search=False))
    monkeypatch.setattr("pipeline.quantize.scales.SEARCH_ROWS", 128)
    sampled = search_scales(weight, statistics, SCHEME, SolveOptions(clip_search=False))
    unscaled = _output_loss(weight[::3], torch.ones(96), statistics, False)
    assert sampled.loss_unscaled == pytest.approx(unscaled, rel=1e-3), "its losses are of the rows that were searched"
    assert _output_loss(weight, sampled.scale_I, statistics, False) <= full.loss_scaled * 1.05


def test_damaged_statistics_are_refused(layer: Layer) -> None:
    weight, statistics = layer(8, 96)
    poisoned = statistics.abs_sum_I.clone()
    poisoned[1] = float("nan")
    with pytest.raises(QuantizationError, match="mean of the inputs"):
        search_scales(weight, replace(statistics, abs_sum_I=poisoned), SCHEME, SolveOptions())


def test_feeding_errors_back_after_the_scales_loses_less_than_rounding(layer: Layer) -> None:
    weight, statistics = layer(64, 96)
    scale_I = search_scales(weight, statistics, SCHEME, SolveOptions()).scale_I
    scaled_weight, scaled_statistics = weight * scale_I, rescale(statistics, scale_I)
    losses = [
        solve(method, scaled_weight, [weight.shape[0]], scaled_statistics, SCHEME, SolveOptions())[0].report.loss
        for method in (Method.AWQ_GPTQ, Method.AWQ)
    ]
    assert losses[0] < 0.9 * losses[1]
