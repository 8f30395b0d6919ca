"""The GPU's loops give what torch gives: run in Triton's interpreter, on the CPU, and compiled for GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.quantize import gptq, kernels, triton_kernels
from pipeline.quantize.grid import channel_importance, fit_grid
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.statistics import accumulate, empty
from pipeline.quantize.types import Scheme
from pipeline.spec import Method
from tests.factories import columns_of

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(1200)]

SCHEMES = [Scheme(4, 32, True), Scheme(3, 16, False), Scheme(8, 96, True), Scheme(2, 32, False)]


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(kernels, "take", lambda tensor: False)
    return monkeypatch


def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: False)
    monkeypatch.setattr(triton_kernels, "take", lambda tensor: True)


def layer(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    mixing = torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5 + torch.eye(num_columns)
    x = torch.randn(400, num_columns, generator=generator) @ mixing
    return torch.randn(num_rows, num_columns, generator=generator) * 0.03, x.bfloat16()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_columns_are_solved_as_torch_solves_them(scheme: Scheme, with_torch: pytest.MonkeyPatch) -> None:
    weight, x = layer(37, 288)  # rows and columns that fill no tile
    moment = x.float().t() @ x.float()
    scale, zero = fit_grid(weight, channel_importance(moment.diagonal()), scheme, True)
    factored = gptq.factor(moment, 0.01, True)
    assert factored is not None
    slow = columns_of(weight, scale, zero, scheme, factored)
    with_triton(with_torch)
    fast = columns_of(weight, scale, zero, scheme, factored)

    # Sums are rounded otherwise: now and then a weight lies between two codes, and its row goes another way from there.
    same = (fast.codes_OI == slow.codes_OI).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(fast.loss_O[same], slow.loss_O[same], rtol=1e-4, atol=0)
    torch.testing.assert_close(fast.error_norm_O[same], slow.error_norm_O[same], rtol=1e-9, atol=0)
    assert float(fast.loss_O.sum()) == pytest.approx(float(slow.loss_O.sum()), rel=0.01)
    assert fast.is_finite_O.all()


def test_a_row_is_solved_alike_whatever_it_is_solved_with(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(70, 128)
    statistics, scheme = accumulate(empty(128), x), Scheme(4, 32, True)
    with_triton(monkeypatch)
    (alone,) = solve(Method.GPTQ, weight[40:41], [1], statistics, scheme, SolveOptions())
    (stacked,) = solve(Method.GPTQ, weight, [70], statistics, scheme, SolveOptions())
    assert torch.equal(alone.codes_OI, stacked.codes_OI[40:41])
    assert torch.equal(alone.scale_OG, stacked.scale_OG[40:41])


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_linears_solved_together_are_what_each_is_alone(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has statistics of its own; blocks of columns lie apart in memory then."""
    targets = []
    for seed in (1, 2, 3):
        weight, x = layer(37, 288)
        weight, moment = weight.roll(seed, 0) * seed, torch.roll(x, seed, 1).float()
        moment = moment.t() @ moment
        scale, zero = fit_grid(weight, channel_importance(moment.diagonal()), scheme, True)
        factored = gptq.factor(moment, 0.01, True)
        assert factored is not None
        targets.append(gptq.Target(weight, scale, zero, factored))
    assert not torch.equal(targets[0].factored.order_I, targets[1].factored.order_I)
    with_triton(monkeypatch)
    alone = [gptq.solve_columns([target], scheme)[0] for target in targets]
    for found, expected in zip(gptq.solve_columns(targets, scheme), alone, strict=True):
        assert torch.equal(found.codes_OI, expected.codes_OI)
        assert torch.equal(found.loss_O, expected.loss_O)
        assert torch.equal(found.error_norm_O, expected.error_norm_O)
        assert found.is_finite_O.all()


def test_a_row_that_does_not_stay_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(5, 64)
    moment = x.float().t() @ x.float()
    factored = gptq.factor(moment, 0.01, True)
    assert factored is not None
    factored.feedback_II[0, 1] = float("nan")
    scale, zero = fit_grid(weight, channel_importance(moment.diagonal()), Scheme(4, 32, True), False)
    weight[3, factored.order_I[0]] += scale[3, 0] / 3  # its first column errs, so what is fed back counts
    with_triton(monkeypatch)
    assert not columns_of(weight, scale, zero, Scheme(4, 32, True), factored).is_finite_O[3]


def summed(width: int, *parts: Tensor) -> Tensor:
    """Return the second moment of all parts. The interpreter takes a bfloat16's bits for a number where it multiplies,
    so it is given the same numbers as float16, whose products are exact in float32 too."""
    moment = torch.zeros(width, width)
    for x in parts:
        assert torch.equal(x.half().float(), x.float())
        triton_kernels.add_products(moment, x.half())
    return moment


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 16), (200, 96), (130, 300)])
def test_second_moments_are_symmetric_sums(num_tokens: int, width: int) -> None:
    x = torch.randint(-999, 999, (num_tokens, width), generator=torch.Generator().manual_seed(1)).div(256).bfloat16()
    moment = summed(width, x, x[: num_tokens // 2])
    exact = x.double().t() @ x.double() + x[: num_tokens // 2].double().t() @ x[: num_tokens // 2].double()
    torch.testing.assert_close(moment.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(moment, moment.t())


def test_every_tile_of_a_wide_second_moment_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "COLUMNS", 16)
    monkeypatch.setattr(triton_kernels, "TOKENS", 16)
    x = torch.randint(-9, 9, (8, 400), generator=torch.Generator().manual_seed(1)).bfloat16()  # 325 tiles
    assert torch.equal(summed(400, x), x.float().t() @ x.float())


def test_inputs_in_bfloat16_on_a_gpu_are_added_by_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def add_products(moment: Tensor, x: Tensor) -> Tensor:
        asked.append(x.dtype)
        return moment.addmm_(x.float().t(), x.float())

    x = layer(1, 32)[1]
    plain = accumulate(empty(32), x.float())
    monkeypatch.setattr(triton_kernels, "add_products", add_products)
    with_triton(monkeypatch)
    own = accumulate(empty(32), x)
    torch.testing.assert_close(own.second_moment_II, plain.second_moment_II)
    assert torch.equal(own.abs_sum_I, plain.abs_sum_I)
    assert torch.equal(own.abs_max_I, plain.abs_max_I)
    accumulate(empty(32), x.float())
    assert asked == [torch.bfloat16]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.compiled import PUSH
from pipeline.quantize import triton_kernels, triton_loops

floats = ["target", "weight", "feedback", "scale", "zero", "step", "error"]
doubles = ["pivot", "added", "loss", "error_norm"]
solve = {name: "*fp32" for name in floats} | {name: "*fp64" for name in doubles} | {"group": "*i64"}
solve |= {"num_rows": "i32", "num_columns": "i32", "width": "i32", "num_groups": "i32", "max_code": "fp32"}
add = {"moment": "*fp32", "x": "*bf16", "num_tokens": "i32", "width": "i32"}
for capability in (80, 90):
    for loop, types, constants, num_warps in (
        (triton_loops.solve_block, solve, {"PUSH": PUSH, "COLUMNS": 128, "ROWS": 32}, 4),
        (triton_loops.add_products, add, {"COLUMNS": triton_kernels.COLUMNS, "TOKENS": triton_kernels.TOKENS}, 8),
    ):
        types = {name: types.get(name, "constexpr") for name in loop.arg_names}
        source = ASTSource(fn=loop, signature=types, constexprs=constants)
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(loop.fn.__name__, capability, len(made.asm["cubin"]) > 0, "local memory:", ".local " in made.asm["ptx"])
"""


def test_the_loops_compile_for_gpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        f"{loop} {capability} True local memory: False"
        for capability in (80, 90)
        for loop in ("solve_block", "add_products")
    ]
