"""How well one job spreads over workers, and what Ray costs against calling the same functions in one process.

Runs the job inline, with one worker and with several (one thread each, so as many cores are needed), then the same in
reverse order, each in a fresh work directory. What the machine itself gives is found by as many inline conversions at
once, which share nothing but its caches, memory and clock: no schedule can do better than they do. What the driver and
Ray's own processes use of the cores is told apart from what workers use. From the repository root:
``.venv/bin/python benchmarks/scaling.py [--model FOLDER] [--workers 2]``
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from conversions import Conversion, Job, Timing
from flags import add_model, add_order, job_parser, scratch_folder, the_job, there_and_back
from models import Shape
from report import print_header, print_table
from sessions import Role, cpu_seconds_of, processes_of

LOOK_S = 0.5
"""Between two looks at the processes of a conversion."""


class CpuSeconds:
    """What the processes of a conversion use of the cores from when the first worker was ready, by role."""

    def __init__(self, run: Conversion) -> None:
        self._run = run
        self._since: dict[int, float] = {}
        self._until: dict[int, tuple[Role, float]] = {}
        self._looked_s = 0.0

    def look(self) -> None:
        """Take in what they have used by now; once in ``LOOK_S``, as looking takes time of a core too."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        for process in processes_of(self._run.session):
            used = cpu_seconds_of(process.pid)
            if used is None:
                continue
            if not self._run.worked_s:
                self._since[process.pid] = used
            # A worker is called otherwise until its actor has started, and again when it is about to end.
            known = self._until.get(process.pid)
            role = Role.WORKER if known and known[0] is Role.WORKER else process.role
            self._until[process.pid] = role, used

    @property
    def by_role(self) -> Counter[str]:
        """The seconds, as far as it was looked at. Of a process that came later they are counted from its start."""
        found: Counter[str] = Counter()
        for pid, (role, used) in self._until.items():
            found[role.value] += used - self._since.get(pid, 0.0)
        return found


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64"], samples=32, length=256)
    add_model(parser, Shape(layers=4, hidden=1024, intermediate=2816))
    add_order(parser)
    parser.add_argument("--workers", type=int, default=2, help="against one, default 2")
    args = parser.parse_args()
    print_header()
    many = f"{args.workers} workers"
    with scratch_folder(args) as folder:
        job = the_job(args, folder)
        timings = defaultdict(list)
        for kind in there_and_back(["inline", "1 worker", many, "at once"], args.single):
            if kind == "at once":
                found = _at_once(job, folder / "run", args.workers)
            else:
                found = [_measure(job, folder / "run", kind, args.workers if kind == many else 1)]
            for timing, cpu in found:
                used = ", ".join(f"{role} {seconds:.1f}" for role, seconds in cpu.most_common())
                print(
                    f"{kind:<10} work {timing.work_s:7.1f} s, whole command {timing.whole_s:7.1f} s; CPU s: {used}",
                    flush=True,
                )
            timings[kind] += [timing for timing, _ in found]
    _report(timings["inline"], timings["1 worker"], timings[many], args.workers)
    machine = _mean(timings["inline"], "busy_s") / _mean(timings["at once"], "busy_s")
    print(f"the machine: inline alone against {args.workers} at once:   {machine:.3f}")


Measured = tuple[Timing, Counter[str]]
"""How long a conversion took, and CPU seconds by role."""


def _at_once(job: Job, place: Path, number: int) -> list[Measured]:
    """Return how long inline conversions take that run at the same time, each with a work directory of its own."""
    try:
        with ExitStack() as stack:
            runs = [stack.enter_context(Conversion(job, place / str(i), 1, inline=True)) for i in range(number)]
            cpu = [CpuSeconds(run) for run in runs]

            def look() -> None:
                for item in cpu:
                    item.look()

            return [(run.finish(look), item.by_role) for run, item in zip(runs, cpu, strict=True)]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _measure(job: Job, place: Path, kind: str, workers: int) -> Measured:
    try:
        with Conversion(job, place, workers, inline=kind == "inline") as run:
            cpu = CpuSeconds(run)
            return run.finish(cpu.look), cpu.by_role
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _report(inline: Sequence[Timing], one: Sequence[Timing], many: Sequence[Timing], workers: int) -> None:
    kinds = (("inline", inline), ("1 worker", one), (f"{workers} workers", many))
    rows = [
        [kind, *(f"{_mean(own, field):.1f}" for field in ("work_s", "worker_s", "busy_s", "whole_s"))]
        for kind, own in kinds
    ]
    print_table(["mean seconds", "work", "worker-seconds", "busy", "whole command"], rows)
    efficiency = _sum(one, "work_s") / (workers * _sum(many, "work_s"))
    # The workers after the first become ready later; what they could not do then is start-up, not schedule.
    shared = _sum(one, "worker_s") / _sum(many, "worker_s")
    print(f"efficiency T1 / ({workers} T{workers}), work alone:       {efficiency:.3f}")
    print(f"  the same per second that a worker was ready: {shared:.3f}")
    print(
        f"  the same for the whole command:              {_sum(one, 'whole_s') / workers / _sum(many, 'whole_s'):.3f}"
    )
    # The same units ran: when they took longer side by side, the machine was shared, by them or by others.
    print(f"  time inside units, {workers} workers against 1:       {_sum(many, 'busy_s') / _sum(one, 'busy_s'):.3f}")
    print(f"Ray against inline, 1 worker, work alone:      {_sum(one, 'work_s') / _sum(inline, 'work_s'):.3f}")
    print(f"  the same for the whole command:              {_sum(one, 'whole_s') / _sum(inline, 'whole_s'):.3f}")


def _mean(timings: Sequence[Timing], field: str) -> float:
    return _sum(timings, field) / len(timings)


def _sum(timings: Sequence[Timing], field: str) -> float:
    return sum(getattr(timing, field) for timing in timings)


if __name__ == "__main__":
    main()
