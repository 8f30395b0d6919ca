"""Rounded inputs, what they are expected to cost, and scales that make them cheaper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.quantize import float8
from pipeline.quantize.activations import expected_largest_square, input_rounding_loss, round_inputs
from pipeline.quantize.rtn import round_rows
from pipeline.quantize.smoothquant import search_smooth_scales, smooth_scales
from pipeline.quantize.statistics import accumulate, empty
from pipeline.quantize.types import Scheme, dequantize
from pipeline.spec import Activations, NumberType
from tests.unit.quantize.conftest import Layer

INT8 = Scheme(8, 96, True, NumberType.INT, Activations.DYNAMIC)
FLOAT8 = Scheme(8, 96, True, NumberType.FLOAT, Activations.DYNAMIC)


def tokens(loud: float = 1.0, num_tokens: int = 512) -> Tensor:
    """Inputs of which one channel in twelve is louder than the others."""
    x = torch.randn(num_tokens, 96, generator=torch.Generator().manual_seed(3))
    x[:, ::12] *= loud
    return x


@pytest.mark.parametrize("scheme", [INT8, FLOAT8], ids=["int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_rounded_by_its_own_largest_input(scheme: Scheme, dtype: torch.dtype) -> None:
    x = tokens(20.0)[:64].view(4, 16, 96).to(dtype)
    x[1, 3] = 0
    rounded = round_inputs(x, scheme)
    assert rounded.dtype is dtype
    assert not rounded[1, 3].any()
    for token, found in zip(x.flatten(0, 1), rounded.flatten(0, 1), strict=True):
        assert torch.equal(round_inputs(token[None], scheme)[0], found)
        largest = 448.0 if scheme.is_float else 127.0
        scale = token.float().abs().max() / largest
        if scale > 0:
            steps = token.float() / scale
            wanted = float8.decode(float8.encode(steps)) if scheme.is_float else steps.round()
            assert torch.equal((wanted * scale).to(dtype), found)


def test_rounding_is_that_of_the_owning_package() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    for scheme in (INT8, FLOAT8):
        arguments = QuantizationArgs(
            num_bits=8, type=scheme.type.value, symmetric=True, strategy=QuantizationStrategy.TOKEN, dynamic=True
        )
        x, module = tokens(5.0)[None], torch.nn.Linear(96, 8)
        theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, arguments, module), arguments)
        ours = round_inputs(x, scheme)
        # Its scale reaches over 127.5 steps, ours over 127, as vLLM's does.
        assert float((theirs - ours).norm() / (x - ours).norm()) < (0.01 if scheme.is_float else 1.0)
        assert float((theirs - x).norm()) == pytest.approx(float((ours - x).norm()), rel=0.02)


def test_unrounded_inputs_are_the_same_tensor() -> None:
    x = tokens()
    assert round_inputs(x, Scheme(8, 96, True)) is x


@pytest.mark.parametrize("loud", [1.0, 5.0, 100.0])
def test_the_expected_largest_square_is_that_of_normal_numbers(loud: float) -> None:
    x = tokens(loud, 20000)
    variance = torch.ones(96)
    variance[::12] = loud**2
    measured = float(x.square().amax(-1).mean())
    assert expected_largest_square(variance) == pytest.approx(measured, rel=0.02)
    assert expected_largest_square(variance * 1e-12) == pytest.approx(measured * 1e-12, rel=0.02)


def test_one_channel_gives_its_variance_and_none_nothing() -> None:
    variance = torch.zeros(96)
    assert expected_largest_square(variance) == 0.0
    variance[5] = 3.0
    assert expected_largest_square(variance) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_the_expected_cost_of_rounding_inputs_is_what_it_costs(loud: float) -> None:
    x = tokens(loud, 4096)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4)) * 0.05
    measured = float(((round_inputs(x, INT8) - x).double() @ weight.double().T).square().sum()) / 4096
    assert input_rounding_loss(weight, x.square().mean(0)) == pytest.approx(measured, rel=0.1)


def output_error(x: Tensor, weight: Tensor, scale: Tensor) -> float:
    """Return the squared output error with weight and inputs rounded, scaled by ``scale``."""
    grid = round_rows(weight * scale, torch.ones(96), INT8, search=False)
    output = round_inputs(x / scale, INT8).double() @ dequantize(*grid, INT8).double().T
    return float((output - x.double() @ weight.double().T).square().sum())


def test_loud_channels_are_made_quieter_and_outputs_err_less() -> None:
    x, weight = tokens(40.0), torch.randn(48, 96, generator=torch.Generator().manual_seed(5)) * 0.04
    found = search_smooth_scales(weight, accumulate(empty(96), x), INT8, lambda values: values)
    assert found.exponent > 0
    assert found.loss_scaled < 0.5 * found.loss_unscaled
    assert float(found.scale_I[::12].min()) > float(found.scale_I[1::12].max())
    ones, half = torch.ones(96), smooth_scales(x.abs().amax(0), weight.abs().amax(0), 0.5)
    errors = [output_error(x, weight, scale) for scale in (found.scale_I, half, ones)]
    assert errors[0] < 1.1 * errors[1]
    assert errors[0] < 0.6 * errors[2]
    assert errors[0] / len(x) == pytest.approx(found.loss_scaled, rel=0.3)


def test_the_search_never_loses_to_no_scales(layer: Layer) -> None:
    for seed in range(4):
        weight, statistics = layer(32, 96, seed=seed)
        found = search_smooth_scales(weight, statistics, INT8, lambda values: values)
        assert found.loss_scaled <= found.loss_unscaled
        if found.exponent == 0:
            assert torch.equal(found.scale_I, torch.ones(96))


def test_scales_are_those_of_the_paper_up_to_a_factor() -> None:
    inputs, weights = torch.rand(96) + 0.1, torch.rand(96) + 0.1
    ratio = smooth_scales(inputs, weights, 0.7) / (inputs**0.7 / weights**0.3)
    assert torch.allclose(ratio, ratio[0].expand(96), rtol=1e-5)
    scale = smooth_scales(inputs, weights, 0.7)
    assert float(scale.min() * scale.max()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.0])
def test_silent_channels_leave_scales_finite_and_positive(exponent: float) -> None:
    inputs, weights = torch.ones(96), torch.ones(96)
    inputs[3], weights[7] = 0.0, 0.0
    for scale in (smooth_scales(inputs, weights, exponent), smooth_scales(inputs * 0, weights, exponent)):
        assert bool((scale.isfinite() & (scale > 0)).all())
    assert torch.equal(smooth_scales(inputs, weights * 0, exponent), torch.ones(96))


def test_channels_that_share_a_row_get_one_scale() -> None:
    x, weight = tokens(40.0), torch.randn(48, 96, generator=torch.Generator().manual_seed(5)) * 0.04

    def share(values: Tensor) -> Tensor:
        return values.view(2, 48).mean(0).repeat(2)

    found = search_smooth_scales(weight, accumulate(empty(96), x), INT8, share)
    assert torch.equal(found.scale_I[:48], found.scale_I[48:])
    assert found.exponent > 0
