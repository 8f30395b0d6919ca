"""Loops over numbers that have no matrix product in them, compiled to machine code on the CPU (numba).

What torch does with such loops is one pass over memory for every operation. A compiled loop reads a number once and
keeps what follows from it in registers. The first call on a machine compiles, which takes seconds; the code is kept
beside the source, or in the user's cache where that cannot be written, and later processes load it.

LLVM takes vectors of 256 bits on Intel's processors unless told otherwise, as programs that use wider ones now and then
lose clock rate by it. These loops do little else: with 512 bits they took 0.68 to 0.93 of the time (Xeon with AMX, one
thread, 960 x 576, 4 bits, 2026-11-26), and give the same bits.

Order of operations. Products and sums are not reordered (no fast-math), so a loop gives the same bits on every machine
with fused multiply-add. Loops are written over ``LANES`` neighbours that have nothing to do with each other (rows of a
weight): the compiler does them at once, and what becomes of one does not depend on the others, nor on its place.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core.codegen import get_host_cpu_features

if platform.machine() == "x86_64" and numba.config.CPU_FEATURES is None:  # type: ignore[attr-defined]
    # Unless NUMBA_CPU_FEATURES says something else. Part of what compiled code is kept under.
    numba.config.CPU_FEATURES = f"{get_host_cpu_features()},-prefer-256-bit"  # type: ignore[attr-defined, no-untyped-call]

LANES = 64
"""Rows that a loop works on at once: four AVX-512 registers, so that one's result is there before it is needed."""

PUSH = 12582912.0
"""1.5 * 2**23: added and taken off, it rounds a float32 below 2**22 to the nearest whole number, ties to even."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Return the function compiled on its first call, and kept for other processes. Other threads may run meanwhile."""
    return cast("_Function", numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})(function))
