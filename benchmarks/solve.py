"""How long the solvers take and how well they do, on layers that look like those of a language model.

Inputs are synthetic (correlated channels, a few loud ones); errors compare solvers with each other and say nothing of
any real model. Run from the repository root:
``python -m benchmarks.solve [--threads 1] [--device cpu] [--shape 576x1536 ...]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.quantize.awq import search_scales
from pipeline.quantize.gptq import factor
from pipeline.quantize.solve import SolveOptions, solve
from pipeline.quantize.statistics import accumulate, empty, rescale
from pipeline.quantize.types import Scheme, Statistics
from pipeline.spec import Method

SCHEMES = (Scheme(4, 64, True), Scheme(4, 64, False), Scheme(8, 64, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", action="append", help="rows x columns of the stack, for example 576x1536")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s), group size 64")
    print(f"{'shape':>12}  {'solver':<13} {'grid':<9} {'time':>9}  relative output error")
    for shape in args.shape or ("960x576", "3072x576", "576x1536"):
        rows, columns = map(int, shape.split("x"))
        weight_OI, statistics = _layer(rows, columns, torch.device(args.device))
        _row(shape, "factor", "", _timed(partial(factor, statistics.second_moment_II, 0.01, True)), None)
        for scheme in SCHEMES:
            _scheme_rows(shape, weight_OI, statistics, scheme)


def _scheme_rows(shape: str, weight_OI: Tensor, statistics: Statistics, scheme: Scheme) -> None:
    grid, sizes = f"w{scheme.bits} {'sym' if scheme.symmetric else 'asym'}", [weight_OI.shape[0]]
    for label, method, options in (
        ("rtn plain", Method.RTN, SolveOptions(clip_search=False)),
        ("rtn", Method.RTN, SolveOptions()),
        ("gptq", Method.GPTQ, SolveOptions()),
        ("gptq, 1 round", Method.GPTQ, SolveOptions(refinement=1)),
        ("gptq, 5", Method.GPTQ, SolveOptions(refinement=5)),
        ("rtn, 5", Method.RTN, SolveOptions(refinement=5)),
    ):
        (linear,) = solve(method, weight_OI, sizes, statistics, scheme, options)
        seconds = _timed(partial(solve, method, weight_OI, sizes, statistics, scheme, options))
        _row(shape, label, grid, seconds, linear.report.relative_error)
    options = SolveOptions()
    found = search_scales(weight_OI, statistics, scheme, options)
    _row(shape, "awq scales", grid, _timed(partial(search_scales, weight_OI, statistics, scheme, options)), None)
    scaled_OI, scaled = weight_OI * found.scale_I, rescale(statistics, found.scale_I)
    (linear,) = solve(Method.AWQ, scaled_OI, sizes, scaled, scheme, options)
    seconds = _timed(partial(solve, Method.AWQ, scaled_OI, sizes, scaled, scheme, options))
    _row(shape, "awq", grid, seconds, linear.report.relative_error)


def _row(shape: str, solver: str, grid: str, seconds: float, error: float | None) -> None:
    print(f"{shape:>12}  {solver:<13} {grid:<9} {seconds * 1e3:6.0f} ms  {'' if error is None else f'{error:.5f}'}")


def _layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns) / 2
    loudness = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(4096, columns, generator=generator) @ mixing * loudness
    weight = torch.randn(rows, columns, generator=generator) * 0.03
    return weight.to(device), accumulate(empty(columns, device), x.bfloat16().to(device))


def _timed(call: Callable[[], object]) -> float:
    """Return the best of three runs in seconds, with the device's queue drained."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
