"""bfloat16 factors in blocks: what is rounded, what is not, and for every kind of linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipeline.graph.outline import open_folder
from pipeline.precision import Precision
from pipeline.skeleton import products as products_module
from pipeline.skeleton.products import _Rounded, prefer_onednn, products
from tests.architectures import DENSE, make_model


@pytest.mark.parametrize("name", DENSE)
def test_a_block_in_bfloat16_is_near_the_one_in_float32(name: str, tmp_path: Path) -> None:
    source = open_folder(make_model(name, tmp_path / name))
    skeleton = source.outline.skeleton
    torch.manual_seed(1)
    hidden = torch.randn(2, 24, skeleton.net.config.get_text_config().hidden_size)
    outputs = {}
    for precision in Precision:
        weights = skeleton.dense(1, source.block(1), precision)
        with skeleton.attached(1, weights, precision) as block:
            kept = {parameter.dtype for parameter in block.parameters()}
            outputs[precision] = skeleton.run_block(1, hidden)
        assert (torch.bfloat16 in kept) is (precision is Precision.BFLOAT16)
        assert outputs[precision].dtype is torch.float32
    error = (outputs[Precision.BFLOAT16] - outputs[Precision.FLOAT32]).norm() / outputs[Precision.FLOAT32].norm()
    assert 0 < float(error) < 0.02


def test_only_what_is_kept_in_bfloat16_is_rounded() -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    with products(Precision.BFLOAT16):
        assert torch.allclose(functional.linear(x, weight, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-6)
        rounded = functional.linear(x, weight.bfloat16(), bias)
    expected = (x.bfloat16() @ weight.bfloat16().T).float() + bias
    assert torch.equal(rounded, expected)


def test_a_weight_that_is_multiplied_without_its_linear_is_rounded_alike() -> None:
    weight, x = torch.randn(3, 8), torch.randn(8, 5)
    expected = (weight.bfloat16() @ x.bfloat16()).float()
    with products(Precision.BFLOAT16):
        for found in (weight.bfloat16() @ x, torch.matmul(weight.bfloat16(), x), weight.bfloat16().matmul(x)):
            assert found.dtype is torch.float32
            assert torch.equal(found, expected)
        assert torch.equal(x.T @ weight.bfloat16().T, expected.T)
        assert (weight.bfloat16() @ x.bfloat16()).dtype is torch.bfloat16
        assert torch.equal(torch.matmul(weight, x, out=torch.empty(3, 5)), weight @ x)


def test_attention_is_rounded_with_its_mask() -> None:
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)
    exact = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with products(Precision.BFLOAT16):
        rounded = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert rounded.dtype is torch.float32
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.02


def test_afterwards_everything_is_as_before() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), products(Precision.BFLOAT16):
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert torch.allclose(functional.linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-6)


def test_an_input_that_several_linears_share_is_rounded_once() -> None:
    x, weights = torch.randn(3, 64), [torch.randn(8, 64).to(torch.bfloat16) for _ in range(3)]
    with torch.no_grad(), products(Precision.BFLOAT16):
        one = _Rounded()
        assert one.of(x) is one.of(x)
        before = [functional.linear(x, weight) for weight in weights]
        kept = one.of(x)
        x.mul_(2)
        assert one.of(x) is not kept, "it is another input now"
        after = [functional.linear(x, weight) for weight in weights]
        again = [functional.linear(x.clone(), weight) for weight in weights]
    for small, large, alone in zip(before, after, again, strict=True):
        assert torch.equal(2 * small, large)
        assert torch.equal(large, alone)


def test_what_is_rounded_is_told_from_what_came_before_at_its_place() -> None:
    rounded = _Rounded()
    with torch.no_grad():
        for value in range(5):
            x = torch.full((4,), float(value))  # the one before is gone, and its memory is taken again
            assert torch.equal(rounded.of(x).float(), x)
    x = torch.ones(4, requires_grad=True)
    assert rounded.of(x) is not rounded.of(x)


def _claim(monkeypatch: pytest.MonkeyPatch, **capabilities: bool | str) -> None:
    """Have this processor taken for another one."""
    found = {"architecture": "x86_64", "cpu_name": "AMD EPYC", **capabilities}
    monkeypatch.setattr(products_module, "_capabilities", lambda: found)


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": True}])
def test_products_of_rounded_factors_are_the_same_with_and_without_instructions_for_them(
    capabilities: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a last bit of bfloat16, as sums are made in another order."""
    _claim(monkeypatch, **capabilities)
    torch.manual_seed(3)
    x, weight, bias = torch.randn(64, 96), torch.randn(48, 96).bfloat16(), torch.randn(48)
    exact = x.bfloat16().double() @ weight.double().T
    with products(Precision.BFLOAT16):
        found = {
            "linear": functional.linear(x, weight),
            "biased linear": functional.linear(x, weight, bias) - bias,
            "addmm": torch.addmm(bias, x, weight.T.contiguous()) - bias,
            "matmul": torch.matmul(x, weight.T),
        }
    for name, output in found.items():
        assert output.dtype is torch.float32
        # Half a step for the rounding, and a little for sums of 96 products that cancel.
        bound = exact.abs() * 2.0**-8 + 1e-4
        assert bool(((output.double() - exact).abs() <= bound).all()), name
        assert "biased" in name or name == "addmm" or torch.equal(output, output.bfloat16().float()), name


def test_gradients_pass_products_without_instructions_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _claim(monkeypatch)
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8).bfloat16()
    with products(Precision.BFLOAT16):
        functional.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.float().sum(0).expand(4, 8), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("capabilities", "is_preferred"),
    [
        ({}, True),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": True}, False),
        ({"cpu_name": "Intel Xeon 2.50GHz"}, False),
        ({"architecture": "aarch64", "cpu_name": "ARM Neoverse-V1"}, False),
    ],
)
def test_onednn_is_preferred_where_its_float32_products_are_exact_and_faster(
    capabilities: dict[str, bool | str], is_preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _claim(monkeypatch, **capabilities)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"
        prefer_onednn()
        assert (matmul.fp32_precision == "bf16") is is_preferred
        with products(Precision.BFLOAT16):
            is_asked_for = bool(capabilities.get("amx_bf16")) or is_preferred
            assert (matmul.fp32_precision == "bf16") is is_asked_for
        assert (matmul.fp32_precision == "bf16") is is_preferred
    finally:
        matmul.fp32_precision = before
