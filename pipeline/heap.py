"""This process's memory as the system sees it, and how what was freed is given back.

An allocator keeps freed memory for later. After many tensors of many sizes that can be several times what is in use.
glibc maps large blocks on their own, and gives them back when they are freed, but what counts as large grows with what
is freed: up to 32 MB.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

FREED_BYTES = 96_000_000
"""Freed memory that a process may keep. Giving all of it back after every unit of work costs a tenth of the time, as it
has to be asked for again."""

MAPPED_BYTES = 16 << 20
"""Blocks from this size on are always mapped on their own. Smaller ones are made too often: each time the system has to
clear their pages."""

KEPT_BYTES = 64 << 20
"""Free memory at the heap's end that is kept."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of ``mallopt`` as malloc.h numbers them."""

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def map_large_blocks() -> None:
    """From now on give large blocks back to the system as soon as they are freed, where the C library can (glibc)."""
    set_option = _function("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, MAPPED_BYTES)
        set_option(_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Give freed memory back to the system where the C library can (glibc); it takes some milliseconds."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@lru_cache(maxsize=2)
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
