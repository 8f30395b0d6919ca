"""Where the time of a conversion goes: by kind of work, and by function.

The whole conversion runs in this process on one thread, under Python's profiler, which adds to what calls many small
functions and sees neither threads that read ahead nor into compiled code: that counts for the function that calls it.
From the repository root: ``.venv/bin/python benchmarks/hotspots.py [--model FOLDER]``
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import Counter
from pathlib import Path

import torch
from flags import add_model, job_parser, scratch_folder, the_job
from models import Shape
from report import print_header, print_table

from pipeline.graph.convert import RunOptions, convert
from pipeline.observe.events import ClosingSink, Event, StageFinished
from pipeline.settings import load_settings
from pipeline.spec import build_spec

LEAST_SHARE = 0.01
"""Functions that take less of the time themselves are not listed."""

ROOT = Path(__file__).parent.parent


class Stages(ClosingSink):
    """Adds up the seconds of units by what they do."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.number: Counter[str] = Counter()

    def emit(self, event: Event) -> None:
        if isinstance(event, StageFinished):
            self.seconds[event.phase.value] += event.seconds
            self.number[event.phase.value] += 1

    def rows(self, whole_s: float) -> list[list[str]]:
        """Return rows of work, number of units, seconds and share, what passes outside units at last."""
        rows = [[name, str(self.number[name]), *share(s, whole_s)] for name, s in self.seconds.most_common()]
        return [*rows, ["outside units", "", *share(whole_s - sum(self.seconds.values()), whole_s)]]


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64"], samples=128, length=512)
    add_model(parser, Shape(layers=4, hidden=1024, intermediate=2816))
    args = parser.parse_args()
    print_header()
    torch.set_num_threads(1)
    stages, profile = Stages(), cProfile.Profile()
    with scratch_folder(args) as folder:
        spec = build_spec(the_job(args, folder).spec(folder / "out"), "benchmark")
        start_s, start_cpu_s = time.monotonic(), time.process_time()
        profile.enable()
        convert(spec, load_settings(), RunOptions(folder / "work", workers=1, inline=True), stages)
        profile.disable()
        whole_s, cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
    inside_s = sum(stages.seconds.values())
    print(f"whole {whole_s:.1f} s, {cpu_s:.1f} s of a processor; inside units {inside_s:.1f} s")
    print_table(["work", "units", "s", "share"], stages.rows(whole_s))
    print_table(["function, own time", "calls", "s", "share"], _functions(pstats.Stats(profile), whole_s))


def _functions(stats: pstats.Stats, whole_s: float) -> list[list[str]]:
    """Return rows of the functions that take most time themselves, not in what they call."""
    # The types of the standard library leave out what its documentation calls the stats attribute.
    entries = stats.stats.items()  # type: ignore[attr-defined]
    own = sorted(((own_s, calls, place) for place, (_, calls, own_s, _, _) in entries), reverse=True)
    return [[_name(*p), str(calls), *share(s, whole_s)] for s, calls, p in own if s > LEAST_SHARE * whole_s]


def _name(file: str, line: int, function: str) -> str:
    if file == "~":
        return function.strip("{}<>").replace("built-in method ", "")
    path = Path(file)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{shown}:{line} {function}"


def share(seconds: float, whole_s: float) -> list[str]:
    """Return seconds and their share of the whole as a table shows them."""
    return [f"{seconds:.1f}", f"{seconds / whole_s:.1%}"]


if __name__ == "__main__":
    main()
