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
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from conversions import Conversion, Job, Timing
from flags import add_model, add_order, job_parser, scratch_folder, the_job, there_and_back
from models import Shape
from report import print_header, print_table
from sessions import Effort, Role, effort_of, processes_of

LOOK_S = 2.0
"""Between two looks at the processes of a conversion. A look takes milliseconds of a core, which workers lack."""


class Efforts:
    """What the processes of a conversion have cost by role, from the last look before the first worker was ready."""

    def __init__(self, run: Conversion) -> None:
        self._run = run
        self._since: dict[int, Effort] = {}
        self._until: dict[int, tuple[Role, Effort]] = {}
        self._looked_s = 0.0

    def look(self) -> None:
        """Take in what they have cost by now; once in ``LOOK_S``, as looking takes time of a core too."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        for process in processes_of(self._run.session):
            effort = effort_of(process.pid)
            if effort is None:
                continue
            if not self._run.worked_s:
                self._since[process.pid] = effort
            # A worker is called otherwise until its actor has started, and again when it is about to end.
            known = self._until.get(process.pid)
            role = Role.WORKER if known and known[0] is Role.WORKER else process.role
            self._until[process.pid] = role, effort

    @property
    def by_role(self) -> dict[Role, Effort]:
        """What they have cost, as far as it was looked at. Of a process that came later it is counted from its
        start."""
        found: dict[Role, Effort] = {}
        for pid, (role, effort) in self._until.items():
            found[role] = found.get(role, Effort()) + effort - self._since.get(pid, Effort())
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
            for timing, efforts in found:
                cost = ", ".join(
                    f"{role} {effort.user_s:.1f} + {effort.system_s:.1f}" for role, effort in sorted(efforts.items())
                )
                faults = sum(effort.faults for effort in efforts.values())
                print(
                    f"{kind:<10} work {timing.work_s:7.1f} s, whole command {timing.whole_s:7.1f} s; "
                    f"CPU s, own + system: {cost}; page faults {faults / 1e6:.2f} M",
                    flush=True,
                )
            timings[kind] += [timing for timing, _ in found]
    _report(timings["inline"], timings["1 worker"], timings[many], args.workers)
    machine = _mean(timings["inline"], "busy_s") / _mean(timings["at once"], "busy_s")
    print(f"the machine: inline alone against {args.workers} at once:   {machine:.3f}")


Measured = tuple[Timing, dict[Role, Effort]]
"""How long a conversion took, and what it cost by role."""


def _at_once(job: Job, place: Path, number: int) -> list[Measured]:
    """Return how long inline conversions take that run at the same time, each with a work directory of its own."""
    try:
        with ExitStack() as stack:
            runs = [stack.enter_context(Conversion(job, place / str(i), 1, inline=True)) for i in range(number)]
            efforts = [Efforts(run) for run in runs]

            def look() -> None:
                for item in efforts:
                    item.look()

            return [(run.finish(look), item.by_role) for run, item in zip(runs, efforts, strict=True)]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _measure(job: Job, place: Path, kind: str, workers: int) -> Measured:
    try:
        with Conversion(job, place, workers, inline=kind == "inline") as run:
            efforts = Efforts(run)
            return run.finish(efforts.look), efforts.by_role
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _report(inline: Sequence[Timing], one: Sequence[Timing], many: Sequence[Timing], workers: int) -> None:
    kinds = (("inline", inline), ("1 worker", one), (f"{workers} workers", many))
    rows = [
        [kind, *(f"{_mean(own, field):.1f}" for field in ("work_s", "worker_s", "busy_s", "whole_s"))]
        for kind, own in kinds
    ]
    print_table(["mean seconds", "work", "worker-seconds", "busy", "whole command"], rows)
    _report_phases(one, many, workers)
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


def _report_phases(one: Sequence[Timing], many: Sequence[Timing], workers: int) -> None:
    """Print where units take longer side by side."""

    def seconds(timings: Sequence[Timing], phase: str) -> float:
        return sum(timing.phases[phase].busy_s for timing in timings) / len(timings)

    rows = []
    for phase, alone in one[0].phases.items():
        first, second = seconds(one, phase), seconds(many, phase)
        units = [str(alone.num_units), str(many[0].phases[phase].num_units)]
        rows.append([phase, *units, f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}", f"{second - first:.1f}"])
    print_table(["mean, busy s", "units, 1", f"units, {workers}", "1 worker", f"{workers}", "ratio", "more"], rows)


def _mean(timings: Sequence[Timing], field: str) -> float:
    return _sum(timings, field) / len(timings)


def _sum(timings: Sequence[Timing], field: str) -> float:
    return sum(getattr(timing, field) for timing in timings)


if __name__ == "__main__":
    main()
