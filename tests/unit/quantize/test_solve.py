"""The one entry to all solvers: stacks, reports, degradations, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize import solve as solve_module
from pipeline.quantize.solve import SolveOptions, Stack, prepare_factor, solve, solve_stacks
from pipeline.quantize.types import QuantizedLinear, Scheme, Statistics
from pipeline.spec import Method

Layer = Callable[..., tuple[Tensor, Statistics]]
SCHEMES = [Scheme(4, 16, True), Scheme(4, 32, False), Scheme(8, 96, True)]
METHODS = list(Method)


def _loss(linear: QuantizedLinear, weight: Tensor, statistics: Statistics) -> float:
    delta = linear.dequantize().double() - weight.double()
    return float(((delta @ statistics.second_moment_II.double()) * delta).sum()) / statistics.num_tokens


def _same(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    return (
        torch.equal(one.codes_OI, other.codes_OI)
        and torch.equal(one.scale_OG, other.scale_OG)
        and torch.equal(one.zero_OG, other.zero_OG)
        and one.report == other.report
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_report_states_the_losses_of_what_is_returned(layer: Layer, method: Method, scheme: Scheme) -> None:
    weight, statistics = layer(24, 96)
    (linear,) = solve(method, weight, [24], statistics, scheme, SolveOptions())
    delta = (linear.dequantize() - weight).double()
    energy = float(((weight.double() @ statistics.second_moment_II.double()) * weight).sum()) / 512
    assert linear.report.loss == pytest.approx(_loss(linear, weight, statistics), rel=1e-4)
    assert linear.report.relative_error == pytest.approx((linear.report.loss / energy) ** 0.5, rel=1e-4)
    assert linear.report.weight_error == pytest.approx(float(delta.norm() / weight.double().norm()), rel=1e-5)
    assert linear.report.damping == (0.01 if method.codes is Method.GPTQ else 0.0)
    assert linear.report.num_tokens == statistics.num_tokens
    assert linear.report.num_dead_inputs == 0
    assert linear.report.degradations == ()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_report_says_how_far_ranges_were_clipped(layer: Layer, method: Method, scheme: Scheme) -> None:
    weight, statistics = layer(24, 96)
    weight[:, 5] *= 8  # worth clipping: it hardly matters
    moment = statistics.second_moment_II.clone()
    moment[5], moment[:, 5] = moment[5] / 1e4, moment[:, 5] / 1e4
    statistics = replace(statistics, second_moment_II=moment)

    def clip(clip_search: bool) -> float:
        (linear,) = solve(method, weight, [24], statistics, scheme, SolveOptions(clip_search=clip_search))
        groups = weight.double().view(24, -1, scheme.group_size)
        high, low = groups.amax(-1).clamp_min(0), groups.amin(-1).clamp_max(0)
        whole = torch.maximum(high / (scheme.middle - 1), -low / scheme.middle)
        whole = whole if scheme.symmetric else (high - low) / scheme.max_code
        assert linear.report.clip == pytest.approx(float((linear.scale_OG / whole).mean()), rel=1e-6)
        return linear.report.clip

    assert clip(clip_search=False) == pytest.approx(1.0, abs=2**-8)
    assert clip(clip_search=True) < 0.98


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_result_is_well_formed_and_owns_its_memory(layer: Layer, method: Method, scheme: Scheme) -> None:
    weight, statistics = layer(24, 96)
    results = solve(method, weight, [8, 16], statistics, scheme, SolveOptions())
    for linear, rows in zip(results, (8, 16), strict=True):
        assert (linear.codes_OI.dtype, list(linear.codes_OI.shape)) == (torch.uint8, [rows, 96])
        assert (linear.scale_OG.dtype, list(linear.scale_OG.shape)) == (torch.float32, [rows, 96 // scheme.group_size])
        assert (linear.zero_OG.dtype, linear.zero_OG.shape) == (torch.uint8, linear.scale_OG.shape)
        assert int(linear.codes_OI.max()) <= scheme.max_code
        assert not scheme.symmetric or bool((linear.zero_OG == scheme.middle).all())
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(linear.scale_OG.to(dtype).float(), linear.scale_OG)
        for tensor in (linear.codes_OI, linear.scale_OG, linear.zero_OG):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_losses_fall_from_rounding_to_gptq_and_with_searched_grids(layer: Layer, scheme: Scheme) -> None:
    weight, statistics = layer(48, 96)

    def loss(method: Method, clip_search: bool) -> float:
        return solve(method, weight, [48], statistics, scheme, SolveOptions(clip_search=clip_search))[0].report.loss

    plain, searched, gptq = loss(Method.RTN, False), loss(Method.RTN, True), loss(Method.GPTQ, True)
    assert searched < plain
    assert loss(Method.AWQ, True) < plain
    assert gptq < 0.7 * searched
    assert gptq < loss(Method.GPTQ, False)


def test_gptq_never_loses_to_rounding_in_any_row(layer: Layer) -> None:
    # Clipping that the recursion cannot undo: one huge weight in front of a strongly correlated channel.
    weight, statistics = layer(64, 32, tokens=40)
    weight[:, 0] *= 200
    scheme, options = Scheme(4, 32, True), SolveOptions(act_order=False)
    moment = statistics.second_moment_II.double()
    per_row = []
    for method in (Method.GPTQ, Method.RTN):
        (linear,) = solve(method, weight, [64], statistics, scheme, options)
        delta = linear.dequantize().double() - weight.double()
        per_row.append(((delta @ moment) * delta).sum(-1))
    assert bool((per_row[0] <= per_row[1] * (1 + 1e-4)).all())


@pytest.mark.parametrize("tile_rows", [64, 1024])
@pytest.mark.parametrize("method", METHODS)
def test_stack_is_bit_identical_to_each_linear_alone(
    layer: Layer, method: Method, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(solve_module.TILE_ROWS, "cpu", tile_rows)
    weight, statistics = layer(150, 96)
    sizes = [1, 100, 40, 9]
    stacked = solve(method, weight, sizes, statistics, Scheme(4, 16, False), SolveOptions())
    for linear, part in zip(stacked, weight.split(sizes), strict=True):
        (alone,) = solve(method, part, [part.shape[0]], statistics, Scheme(4, 16, False), SolveOptions())
        assert _same(linear, alone)


@pytest.mark.parametrize("method", METHODS)
def test_stacks_solved_together_are_bit_identical_to_each_alone(
    layer: Layer, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, options = Scheme(4, 16, False), SolveOptions(damping=0.01)
    stacks = [Stack(*layer(rows, 96, seed=rows)) for rows in (70, 9, 130)]
    # One that is tried again with more damping, while the others are done.
    weight, statistics = layer(66, 96, seed=4)
    stacks.insert(1, Stack(weight, _indefinite(statistics, -0.05)))
    alone = [solve_stacks(method, [stack], scheme, options)[0] for stack in stacks]
    monkeypatch.setitem(solve_module.TILES_TOGETHER, "cpu", 3)
    for found, expected in zip(solve_stacks(method, stacks, scheme, options), alone, strict=True):
        for name, tensor in found.tensors().items():
            assert torch.equal(tensor, expected.tensors()[name]), name
    if method.codes is Method.GPTQ:
        assert [float(found.damping_O.max()) for found in alone] == pytest.approx([0.01, 0.1, 0.01, 0.01])


def test_rows_tried_again_come_back_in_their_places(layer: Layer) -> None:
    """Of two stacks one has rows of zeros, which err by nothing, so that what that is multiplied by must be finite."""
    (weight, statistics), other, empty = layer(70, 96, seed=1), Stack(*layer(70, 96, seed=2)), [3, 64]
    weight[empty] = 0.0
    scheme, options = Scheme(4, 16, True), SolveOptions(damping=0.01)
    plain = solve_stacks(Method.GPTQ, [Stack(weight, statistics), other], scheme, options)
    broken = prepare_factor(statistics.second_moment_II, options)
    broken.feedback_II[0, 1] = torch.inf
    found = solve_stacks(Method.GPTQ, [Stack(weight, statistics, broken), other], scheme, options)
    assert found[0].damping_O.gt(0.01).nonzero().flatten().tolist() == empty
    assert torch.equal(found[0].scale_OG, plain[0].scale_OG), "grids do not depend on damping"
    assert torch.equal(found[1].codes_OI, plain[1].codes_OI)


def test_an_error_says_which_of_several_stacks_it_is_of(layer: Layer) -> None:
    scheme, options = Scheme(4, 16, True), SolveOptions()
    stacks = [Stack(*layer(8, 32), name=f"experts.{number}.down_proj") for number in range(3)]
    damaged = _indefinite(stacks[1].statistics, -8.0)
    damaged.second_moment_II.diagonal().clamp_min_(0.0)
    with pytest.raises(QuantizationError, match=r"^experts\.1\.down_proj: the second moment could not be factored"):
        solve_stacks(Method.GPTQ, [stacks[0], replace(stacks[1], statistics=damaged), stacks[2]], scheme, options)
    bad = stacks[2].weight_OI.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match=r"^experts\.2\.down_proj: "):
        solve_stacks(Method.RTN, [*stacks[:2], replace(stacks[2], weight_OI=bad)], scheme, options)


@pytest.mark.parametrize("method", METHODS)
def test_same_inputs_give_the_same_result_and_stay_as_they_are(layer: Layer, method: Method) -> None:
    weight, statistics = layer(24, 96)
    before = weight.clone(), statistics.second_moment_II.clone()
    first, second = (solve(method, weight, [24], statistics, SCHEMES[0], SolveOptions()) for _ in range(2))
    assert _same(first[0], second[0])
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.second_moment_II, before[1])


def test_parameters_are_taken_like_tensors(layer: Layer) -> None:
    weight, statistics = layer(8, 32)
    scheme = Scheme(4, 16, True)
    (plain,) = solve(Method.GPTQ, weight, [8], statistics, scheme, SolveOptions())
    (parameter,) = solve(Method.GPTQ, torch.nn.Parameter(weight), [8], statistics, scheme, SolveOptions())
    assert _same(plain, parameter)
    assert not parameter.scale_OG.requires_grad


def test_dead_inputs_are_counted_and_harmless(layer: Layer) -> None:
    weight, statistics = layer(24, 96)
    dead = [0, 50]
    moment = statistics.second_moment_II.clone()
    moment[dead], moment[:, dead] = 0.0, 0.0
    (linear,) = solve(
        Method.GPTQ, weight, [24], replace(statistics, second_moment_II=moment), SCHEMES[0], SolveOptions()
    )
    assert linear.report.num_dead_inputs == 2
    assert linear.report.degradations == ()
    error = (linear.dequantize() - weight).abs()
    assert float(error[:, dead].mean()) < float(weight[:, dead].abs().mean()) / 4


def test_nothing_alive_has_no_error_to_report(layer: Layer) -> None:
    weight, statistics = layer(8, 32)
    silent = replace(statistics, second_moment_II=torch.zeros(32, 32), abs_sum_I=torch.zeros(32))
    for method in METHODS:
        (linear,) = solve(method, weight, [8], silent, Scheme(4, 16, True), SolveOptions())
        assert (linear.report.loss, linear.report.relative_error) == (0.0, 0.0)
        assert linear.report.num_dead_inputs == 32
        assert linear.report.clip > 0
        assert 0 < linear.report.weight_error < 0.2


def _indefinite(statistics: Statistics, lowest: float) -> Statistics:
    width = statistics.abs_sum_I.shape[0]
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    moment = basis @ torch.diag(torch.tensor([lowest] + [1.0] * (width - 1))) @ basis.t()
    return replace(statistics, second_moment_II=(moment + moment.t()) / 2)


def test_raised_damping_is_reported_as_a_degradation(layer: Layer) -> None:
    weight, statistics = layer(8, 32)
    damaged = _indefinite(statistics, -0.05)
    (linear,) = solve(Method.GPTQ, weight, [8], damaged, Scheme(4, 16, True), SolveOptions(damping=0.01))
    assert linear.report.damping == pytest.approx(0.1)
    assert len(linear.report.degradations) == 1
    assert "from 0.01 to 0.1" in linear.report.degradations[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_that_need_a_scale_out_of_range_are_counted(layer: Layer, method: Method, symmetric: bool) -> None:
    weight, statistics = layer(9, 64)
    weight = weight.sign()
    weight[1] *= 2.0**-15 * 7  # exactly half the smallest scale, at 4 bits and symmetric
    weight[2, :16] *= 2.0**-14
    weight[2, 16:32] = 0.0  # an empty group needs no scale at all
    weight[4] *= 2.0**-14
    weight[6, 48:] *= 1e6
    sizes, scheme = [3, 4, 2], Scheme(4, 16, symmetric)
    first, second, third = solve(method, weight, sizes, statistics, scheme, SolveOptions())
    # Asymmetric grids have more codes for the same range, hence the smaller scale.
    below = 1 if symmetric else 5
    assert first.report.degradations == (f"{below} of 12 groups need a scale below half the smallest normal float16",)
    assert second.report.degradations == (
        "4 of 16 groups need a scale below half the smallest normal float16",
        "1 of 16 groups need a scale above the largest that can be stored",
    )
    assert third.report.degradations == ()
    alone = [solve(method, part, [len(part)], statistics, scheme, SolveOptions())[0] for part in weight.split(sizes)]
    assert [one.report for one in alone] == [first.report, second.report, third.report]


def test_the_silent_loss_of_tiny_weights_is_a_degradation(layer: Layer) -> None:
    weight, statistics = layer(64, 512)
    scheme = Scheme(8, 128, True)
    (normal,) = solve(Method.RTN, weight, [64], statistics, scheme, SolveOptions())
    (tiny,) = solve(Method.RTN, weight / 200, [64], statistics, scheme, SolveOptions())
    assert tiny.report.relative_error > 5 * normal.report.relative_error
    assert (normal.report.degradations, len(tiny.report.degradations)) == ((), 1)


def test_moment_that_no_damping_saves_is_an_error_and_not_rounding(layer: Layer) -> None:
    weight, statistics = layer(8, 32)
    damaged = _indefinite(statistics, -8.0)
    damaged.second_moment_II.diagonal().clamp_min_(0.0)
    with pytest.raises(QuantizationError, match="could not be factored"):
        solve(Method.GPTQ, weight, [8], damaged, Scheme(4, 16, True), SolveOptions())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(layer: Layer, method: Method, bad: float) -> None:
    weight, statistics = layer(8, 32)
    scheme = Scheme(4, 16, True)
    poisoned = weight.clone()
    poisoned[3, 7] = bad
    with pytest.raises(QuantizationError, match=r"weight has 1 values .* first at \[3, 7\]"):
        solve(method, poisoned, [8], statistics, scheme, SolveOptions())
    moment = statistics.second_moment_II.clone()
    moment[1, 2] = bad
    with pytest.raises(QuantizationError, match="second moment"):
        solve(method, weight, [8], replace(statistics, second_moment_II=moment), scheme, SolveOptions())


def test_what_does_not_fit_together_is_refused(layer: Layer) -> None:
    weight, statistics = layer(8, 32)
    scheme, options = Scheme(4, 16, True), SolveOptions()
    with pytest.raises(QuantizationError, match="do not make up"):
        solve(Method.RTN, weight, [4, 3], statistics, scheme, options)
    with pytest.raises(QuantizationError, match="do not make up"):
        solve(Method.RTN, weight, [], statistics, scheme, options)
    with pytest.raises(QuantizationError, match="does not divide 32"):
        solve(Method.RTN, weight, [8], statistics, Scheme(4, 24, True), options)
    with pytest.raises(QuantizationError, match="no tokens"):
        solve(Method.RTN, weight, [8], replace(statistics, num_tokens=0), scheme, options)
    with pytest.raises(QuantizationError, match="16 columns"):
        solve(Method.RTN, weight[:, :16].contiguous(), [8], statistics, scheme, options)
    with pytest.raises(QuantizationError, match="float32"):
        solve(Method.RTN, weight.half(), [8], statistics, scheme, options)
    with pytest.raises(QuantizationError, match="9 bits"):
        solve(Method.RTN, weight, [8], statistics, Scheme(9, 16, True), options)
    negative = statistics.second_moment_II.clone()
    negative[0, 0] = -1.0
    with pytest.raises(QuantizationError, match="negative diagonal"):
        solve(Method.RTN, weight, [8], replace(statistics, second_moment_II=negative), scheme, options)


def test_weights_beyond_any_storable_scale_are_refused_when_the_loss_overflows(layer: Layer) -> None:
    weight, statistics = layer(8, 32)
    weight[0, 0] = 3e38
    with pytest.raises(QuantizationError, match="overflows"):
        solve(Method.RTN, weight, [8], statistics, Scheme(4, 16, True), SolveOptions())
