"""What a benchmark prints: the machine, the command, a table."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch


def print_header() -> None:
    """Print what was run, and on what; the load says how far times can be trusted."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    total_kib = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"command  python {shlex.join(sys.argv)}")
    print(
        f"machine  {cores} cores ({model}), {int(total_kib) / 2**20:.0f} GiB, torch {torch.__version__}, {date.today()}"
    )
    print(f"load     {load:.1f} before the start\n", flush=True)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print()
    for row in (head, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
    print(flush=True)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
