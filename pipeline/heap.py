"""Memory as the system sees it: what this process has, how what was freed is given back, and what is left.

An allocator keeps freed memory for later. After many tensors of many sizes that can be several times what is in use.
glibc maps large blocks on their own, and gives them back when they are freed, but what counts as large grows with what
is freed: up to 32 MB.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
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
_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")

_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: the files with limit and use, and what memory.stat calls pages of files that have not
been used lately."""


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def spare_bytes() -> int | None:
    """Return the memory that this process and others like it can still have: what the machine has left, or less where
    control groups, which containers are, leave less; None where the system does not tell."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return min([*found, *_left_in_groups()], default=None)


def _left_in_groups() -> list[int]:
    """Return what each limited control group that this process is in has left. What a group holds of files counts as
    left."""
    try:
        memberships = [line.split(":", 2) for line in _MEMBERSHIPS.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in memberships:
        if "memory" in controllers.split(","):
            top, files = _GROUPS / "memory", _GROUP_FILES[1]
        elif not controllers:
            top, files = _GROUPS, _GROUP_FILES[2]
        else:
            continue
        # Within a container paths may be the host's, of which only the container's own group is there, as the top.
        own = top / path.lstrip("/")
        for folder in (own, *own.parents[: len(own.relative_to(top).parts)]):
            with suppress(OSError, ValueError):  # the topmost has no such files, and a limit may be "max"
                limit, used = (int((folder / name).read_text()) for name in files[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(max(0, limit - used + int(stat.get(files[2], 0))))
    return left


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
