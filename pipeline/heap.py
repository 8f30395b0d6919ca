"""Memory as the system sees it: what this process has, how what it does not use is given back, and what is left.

An allocator keeps freed memory for later. After many tensors of many sizes that can be several times what is in use.
glibc maps large blocks on their own, and gives them back when they are freed, but what counts as large grows with what
is freed: up to 32 MB.

Pages of files and of shared memory count for every process that has touched them, and stay until it lets go of them:
most of what libraries read when they are loaded is never looked at again.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

LEAST_FREED_BYTES = 64_000_000
"""Freed memory that a process keeps at least. Giving all of it back after every unit of work costs a tenth of the time,
as it has to be asked for again and the system clears its pages."""

FREED_BYTES = 120_000_000
"""Freed memory that a process keeps where there is enough. What is freed in pieces comes to this
only after many blocks, so the more it is, the more a worker's peak grows with the depth of a model."""

LARGE_BYTES = 16 << 20
"""Blocks from this size on are always mapped on their own. Smaller ones are made too often: each time the system has to
clear their pages."""

SHARED_BYTES = 16_000_000
"""Pages of shared memory that a worker keeps: what it was handed there it has looked at once."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of ``mallopt`` as malloc.h numbers them."""

_DONT_NEED = 4
"""``MADV_DONTNEED`` as mman.h numbers it."""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")
"""A mapping's line in maps and its first one in smaps: where it begins and ends, its permissions, and the number of its
file, 0 for none."""

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
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
    return _resident()[0]


def private_bytes() -> int:
    """Return how much of the resident memory no file and nobody else has; 0 where the system does not tell."""
    resident, mapped = _resident()
    return resident - mapped


def _resident() -> tuple[int, int]:
    """Return the resident memory, and how much of it is pages of files and of shared memory."""
    try:
        resident, mapped = map(int, _STATM.read_text().split()[1:3])
    except OSError:
        return 0, 0
    return resident * os.sysconf("SC_PAGE_SIZE"), mapped * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(name: str) -> int:
    """Return a size that the system tells of this process; 0 where it does not."""
    return next((1024 * int(line.split()[1]) for line in _lines(_STATUS) if line.startswith(f"{name}:")), 0)


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


def map_large_blocks(freed_bytes: int) -> None:
    """From now on give large blocks back to the system as soon as they are freed, and of others what is more than
    ``freed_bytes`` at the heap's end, where the C library can (glibc)."""
    set_option = _function("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, LARGE_BYTES)
        set_option(_TRIM_THRESHOLD, freed_bytes)


def give_back() -> None:
    """Give freed memory back to the system where the C library can (glibc); it takes some milliseconds."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def drop_code() -> None:
    """Let go of all pages of files that this process has not changed, where the system tells which they are (Linux).
    They stay in the system's own memory: what is touched again is back without being read again.

    Takes 20 ms for a process with torch. Not to be called while libraries are being loaded.
    """
    _drop(_unchanged_files())


def drop_shared(beyond_bytes: int) -> None:
    """Let go of all pages of shared memory when they are more than so many bytes and the system tells (Linux). What
    they hold stays: what is touched again is back."""
    if _status_bytes("RssShmem") > beyond_bytes:
        _drop(_shared())


def _drop(places: Iterable[tuple[int, int]]) -> None:
    advise = _function("madvise")
    for start, end in places if advise is not None else ():
        # What the system refuses, such as locked pages, stays.
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def _unchanged_files() -> Iterator[tuple[int, int]]:
    """Yield where mappings begin and end whose pages are only copies of what the system has: private ones of files that
    cannot be written to and have no page of their own, be it swapped out. What a loader has put addresses into is of a
    file and cannot be written to as well, but has such pages."""
    lines = _lines(_SMAPS)
    heads = [number for number, line in enumerate(lines) if _MAPPING.match(line)]
    for first, last in zip(heads, [*heads[1:], len(lines)], strict=True):
        start, end, permissions, file = _MAPPING.findall(lines[first])[0]
        taken = {name: size.split()[0] for name, _, size in (line.partition(":") for line in lines[first + 1 : last])}
        is_own = permissions[3] == "s" or "w" in permissions or file == "0"
        if not is_own and taken.get("Anonymous") == taken.get("Swap") == "0" != taken.get("Rss"):
            yield int(start, 16), int(end, 16)


def _shared() -> Iterator[tuple[int, int]]:
    """Yield where mappings begin and end that are shared with others."""
    for match in filter(None, map(_MAPPING.match, _lines(_MAPS))):
        start, end, permissions, _ = match.groups()
        if permissions[3] == "s":
            yield int(start, 16), int(end, 16)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@lru_cache(maxsize=4)
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)


def is_lack_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; torch has an exception of its own for that on accelerators only."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
