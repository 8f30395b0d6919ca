"""What a process takes is what the system says, and what it has freed goes back."""

from __future__ import annotations

import subprocess
import sys

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
