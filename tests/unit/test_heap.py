"""What a process takes and what is left is what the system says, and what it has freed goes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import heap

PROGRAM = """
import torch
from pipeline import heap
torch.zeros(1)
before = heap.resident_bytes()
# Smaller than what the allocator maps on its own, so that they come from its heap; the last one holds the heap's end.
tensors = [torch.ones(64 << 8) for _ in range(4000)]
taken = heap.resident_bytes() - before
last = tensors.pop()
del tensors
freed = before + taken - heap.resident_bytes()
heap.give_back()
print(taken, freed, heap.resident_bytes() - before)
"""


def test_freed_memory_is_given_back() -> None:
    printed = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    taken, freed, left = map(int, printed.split())
    assert taken > 250_000_000
    assert freed < 0.5 * taken, "the allocator gives it back by itself, so there is nothing to test"
    assert left < 0.1 * taken


def write(files: dict[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's folder, of which a machine with 8,000 kB left is all."""
    for name, path in {"_MEMINFO": "meminfo", "_MEMBERSHIPS": "cgroup", "_GROUPS": "groups"}.items():
        monkeypatch.setattr(heap, name, tmp_path / path)
    write({tmp_path / "meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nCached: 10 kB\n"})
    return tmp_path


def test_what_is_left_is_what_the_machine_has_left(system: Path) -> None:
    assert heap.spare_bytes() == 8000 * 1024
    write({system / "cgroup": "0::/\n"})
    assert heap.spare_bytes() == 8000 * 1024
    (system / "meminfo").unlink()
    assert heap.spare_bytes() is None


def test_a_container_has_no_more_left_than_its_group_or_one_around_it(system: Path) -> None:
    own = system / "groups" / "slice" / "own"
    write(
        {
            system / "cgroup": "0::/slice/own\n",
            own / "memory.max": "max\n",
            own / "memory.current": "600\n",
            own / "memory.stat": "inactive_file 300\n",
            own.parent / "memory.max": "1000\n",
            own.parent / "memory.current": "900\n",
            own.parent / "memory.stat": "anon 5\ninactive_file 300\n",
        }
    )
    assert heap.spare_bytes() == 1000 - 900 + 300
    write({own / "memory.max": "700\n", own / "memory.stat": "anon 7\n"})
    assert heap.spare_bytes() == 700 - 600
    write({own / "memory.current": "701\n"})
    assert heap.spare_bytes() == 0


def test_groups_of_the_first_version_limit_too(system: Path) -> None:
    """In a container, paths may be those of the host."""
    top = system / "groups" / "memory"
    write(
        {
            system / "cgroup": "9:name=systemd:/x\n4:cpu,memory:/not/here\n0::/\n",
            top / "memory.limit_in_bytes": "5000\n",
            top / "memory.usage_in_bytes": "2000\n",
            top / "memory.stat": "inactive_file 7\ntotal_inactive_file 400\n",
        }
    )
    assert heap.spare_bytes() == 5000 - 2000 + 400


def test_this_machine_has_something_left() -> None:
    spare = heap.spare_bytes()
    assert spare is None or spare > 0


MAPPED_PROGRAM = """
import ctypes, mmap, sys
import torch
from pipeline import heap
torch.zeros(1)

shared = mmap.mmap(-1, 32 << 20)
shared.write(b"x" * len(shared))

# What a loader does to a library: pages of a file that are changed, and cannot be written to afterwards.
with open(sys.argv[1], "rb") as handle:
    own = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
own[0:5] = b"moved"
address = ctypes.addressof(ctypes.c_char.from_buffer(own))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), len(own), mmap.PROT_READ) == 0

def mapped():
    return heap.resident_bytes() - heap.private_bytes()

before, private = mapped(), heap.private_bytes()
heap.drop_shared(len(shared) + (1 << 20))
kept = mapped()
heap.drop_shared(len(shared) - (1 << 20))
unshared = mapped()
heap.drop_code()
print(before, kept, unshared, mapped(), private - heap.private_bytes(), heap.peak_bytes() - heap.resident_bytes())
assert shared[:] == b"x" * len(shared)
assert own[:10] == b"moved" + b"y" * 5
assert torch.linalg.cholesky(4 * torch.eye(300)).trace() == 600
import sqlite3
"""


def test_pages_of_files_and_shared_memory_are_dropped_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "library"
    file.write_bytes(b"y" * (1 << 20))
    program = [sys.executable, "-c", MAPPED_PROGRAM, str(file)]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    before, kept, unshared, after, lost, below_peak = map(int, printed.split())
    assert before > (32 << 20) + 40_000_000
    assert abs(kept - before) < 2_000_000, "as many as they may be stay"
    assert abs(before - unshared - (32 << 20)) < 2_000_000
    assert after < 20_000_000
    assert lost < 5_000_000, "what is the process's own stays"
    assert below_peak > (32 << 20)
