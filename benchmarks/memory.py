"""The largest memory of every process of a conversion, over the depth of the model.

Random Llama models of equal blocks, one conversion each: a process should need the same whatever the depth. With
``--large GB`` instead one model of at least so many gigabytes with blocks (94 MB) and a vocabulary (262 MB) about as
large as those of TinyLlama 1.1B, run with ``--max-memory``.
From the repository root: ``.venv/bin/python benchmarks/memory.py [--depths 8,16,32,64 | --large 6]``
"""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from conversions import Conversion, Job, Timing
from flags import job_parser, scratch_folder, variants_of
from models import Shape, make_llama
from report import print_header, print_table
from sessions import Memory, Process, Role, memory_of, processes_of

HIDDEN, INTERMEDIATE = 512, 1408
LARGE = Shape(1, 2048, 5632, vocabulary=32_000)
LARGE_MEMORY = "1.5GB"
MEGABYTE = 1e6


@dataclass(frozen=True)
class Measured:
    """One conversion.

    Attributes:
        shape: Of its model.
        timing: How long it took.
        peaks: What each of its processes took at most.
    """

    shape: Shape
    timing: Timing
    peaks: dict[Process, Memory]

    def largest(self, role: Role) -> Memory:
        """Return the peaks over all processes of a role."""
        own = [memory for process, memory in self.peaks.items() if process.role is role]
        return Memory(max(memory.peak_bytes for memory in own), max(memory.private_bytes for memory in own))


class Peaks:
    """What the processes of a session took at most, as far as it was looked at."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._seen: dict[int, tuple[Process, Memory]] = {}

    def look(self) -> None:
        """Take in what the processes have taken by now; the last name of a process says what it is."""
        for process in processes_of(self._session):
            now = memory_of(process.pid)
            if now is None:
                continue
            known = self._seen.get(process.pid)
            before = known[1] if known else Memory(0, 0)
            # A worker is called otherwise until its actor has started, and again when it is about to end.
            role = Role.WORKER if known and known[0].role is Role.WORKER else process.role
            most = Memory(max(before.peak_bytes, now.peak_bytes), max(before.private_bytes, now.private_bytes))
            self._seen[process.pid] = Process(process.pid, role), most

    @property
    def found(self) -> dict[Process, Memory]:
        """The peaks by process."""
        return dict(self._seen.values())


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64"], samples=16, length=128)
    parser.add_argument("--depths", default="8,16,32,64", help="blocks of the models, default 8,16,32,64")
    parser.add_argument("--large", type=float, metavar="GB", help="one model of at least so many gigabytes instead")
    parser.add_argument("--max-memory", help="of a worker; default 1.5GB with --large, else as much as it takes")
    parser.add_argument("--workers", type=int, default=2, help="default 2")
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        if args.large:
            outer = 2 * 2 * LARGE.vocabulary * LARGE.hidden
            layers = math.ceil((args.large * 1e9 - outer) / (2 * LARGE.block_parameters))
            shapes = [replace(LARGE, layers=layers)]
        else:
            shapes = [Shape(int(depth), HIDDEN, INTERMEDIATE) for depth in args.depths.split(",")]
        measured = []
        for shape in shapes:
            source = make_llama(folder / "model", shape)
            job = Job(source, variants_of(args), args.samples, args.length)
            measured.append(_measure(job, shape, folder / "run", args))
            shutil.rmtree(source)
            shutil.rmtree(folder / "run")
            print(f"{shape.layers} blocks: work {measured[-1].timing.work_s:.1f} s", flush=True)
    if args.large:
        _report_processes(measured[0])
    else:
        _report_depths(measured)


def _measure(job: Job, shape: Shape, place: Path, args: Namespace) -> Measured:
    max_memory = args.max_memory or (LARGE_MEMORY if args.large else None)
    flags = ["--max-memory", max_memory] if max_memory else []
    with Conversion(job, place, args.workers, flags=flags) as run:
        peaks = Peaks(run.session)
        timing = run.finish(peaks.look)
    return Measured(shape, timing, peaks.found)


def _report_processes(measured: Measured) -> None:
    print(f"\n{measured.shape.layers} blocks, {2 * measured.shape.block_parameters / 1e9:.2f} GB each")
    ordered = sorted(measured.peaks.items(), key=lambda entry: -entry[1].peak_bytes)
    rows = [[f"{process.role} {process.pid}", *_megabytes(memory)] for process, memory in ordered]
    print_table(["process", "peak MB", "private MB"], rows)
    print(f"largest process: {ordered[0][1].peak_bytes / 1e9:.2f} GB")


def _report_depths(measured: list[Measured]) -> None:
    first = measured[0]
    rows = []
    for own in measured:
        cells = [f"{own.shape.layers} blocks", f"{2 * own.shape.layers * own.shape.block_parameters / MEGABYTE:.0f}"]
        for role in (Role.DRIVER, Role.WORKER):
            ratio = own.largest(role).peak_bytes / first.largest(role).peak_bytes
            cells += [*_megabytes(own.largest(role)), f"{ratio:.3f}"]
        rows.append(cells)
    head = ["model", "MB", "driver peak", "private", "ratio", "worker peak", "private", "ratio"]
    print_table(head, rows)
    most = [max(memory.peak_bytes for memory in own.peaks.values()) for own in measured]
    print(f"largest process, {measured[-1].shape.layers} blocks against {first.shape.layers}: {most[-1] / most[0]:.3f}")
    counts = Counter(process.role for process in measured[-1].peaks)
    print(f"processes seen in the last: {', '.join(f'{number} {role}' for role, number in sorted(counts.items()))}")


def _megabytes(memory: Memory) -> list[str]:
    return [f"{value / MEGABYTE:.0f}" for value in (memory.peak_bytes, memory.private_bytes)]


if __name__ == "__main__":
    main()
