"""How fast codes become a format's tensors and come back, in GB/s of the 16-bit weights they stand for.

Run from the repository root: ``python -m benchmarks.pack [--threads 1] [--shape 4096x4096 ...]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from pipeline.formats.codec import codec_for
from pipeline.quantize.types import QuantizedLinear, Scheme, SolveReport
from pipeline.spec import Format

KINDS = (
    (Format.GPTQ, Scheme(2, 64, True)),
    (Format.GPTQ, Scheme(3, 64, True)),
    (Format.GPTQ, Scheme(4, 64, True)),
    (Format.GPTQ, Scheme(8, 64, True)),
    (Format.AWQ, Scheme(4, 64, False)),
    (Format.COMPRESSED_TENSORS, Scheme(4, 64, True)),
    (Format.COMPRESSED_TENSORS, Scheme(4, 64, False)),
    (Format.COMPRESSED_TENSORS, Scheme(5, 64, True)),
    (Format.COMPRESSED_TENSORS, Scheme(6, 64, True)),
    (Format.COMPRESSED_TENSORS, Scheme(8, 64, True)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", action="append", help="rows x columns, for example 4096x4096")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s); GB/s of 16-bit weights, best of 5")
    print(f"{'shape':>12}  {'format':<18} {'grid':<12} {'pack':>7} {'unpack':>7}")
    for shape in args.shape or ("576x1536", "1536x576", "4096x4096"):
        rows, columns = map(int, shape.split("x"))
        for format_, scheme in KINDS:
            linear, codec = _linear(rows, columns, scheme), codec_for(format_)
            tensors = codec.pack("x", linear, torch.bfloat16)
            pack_s = _best_s(partial(codec.pack, "x", linear, torch.bfloat16))
            unpack_s = _best_s(partial(codec.unpack, "x", tensors, scheme))
            gigabytes = 2 * rows * columns / 1e9
            grid = f"w{scheme.bits} {'sym' if scheme.symmetric else 'asym'}"
            print(f"{shape:>12}  {format_:<18} {grid:<12} {gigabytes / pack_s:7.2f} {gigabytes / unpack_s:7.2f}")


def _linear(rows: int, columns: int, scheme: Scheme) -> QuantizedLinear:
    codes = torch.randint(0, scheme.max_code + 1, (rows, columns), dtype=torch.uint8)
    groups = rows, columns // scheme.group_size
    zero = torch.full(groups, scheme.middle, dtype=torch.uint8)
    return QuantizedLinear(
        scheme, codes, torch.full(groups, 2.0**-7), zero, SolveReport(0.0, 0.0, 0.0, 0.0, 1.0, 1, 0, 0, ())
    )


def _best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
