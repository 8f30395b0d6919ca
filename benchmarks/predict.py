"""How far the simulator is from real runs: the same job predicted and run, with one worker and with several.

Predictions are made with the reference rates of ``cost.CPU_RATES``. A machine that is slower, or shared, is off by a
factor, so the schedule is judged apart: the factor of the run with one worker is taken out of those with more. CPU
seconds of the workers, from when each was ready, say how much of the time they had a core at all.
From the repository root: ``.venv/bin/python benchmarks/predict.py [--model FOLDER] [--workers 2]``
"""

from __future__ import annotations

from pathlib import Path

from conversions import Conversion, Job, Timing
from flags import add_model, job_parser, scratch_folder, the_job
from models import Shape
from rates import planned
from report import print_header, print_table
from sessions import Role, effort_of, processes_of

from pipeline.graph.prediction import Cluster, Prediction
from pipeline.graph.simulate import simulate


class CpuTime:
    """CPU seconds of a conversion's workers, from when each of them was ready."""

    def __init__(self, run: Conversion) -> None:
        self._run = run
        self._since: dict[int, float] = {}
        self._until: dict[int, float] = {}

    def look(self) -> None:
        """Take in what the workers have used by now; they become ready in the order in which they were started."""
        ready = max(
            (event["num_ready"] for _, event in self._run.events if event["event"] == "workers_ready"), default=0
        )
        workers = sorted(process.pid for process in processes_of(self._run.session) if process.role is Role.WORKER)
        for pid in workers[:ready]:
            effort = effort_of(pid)
            if effort is not None:
                self._since.setdefault(pid, effort.cpu_s)
                self._until[pid] = effort.cpu_s

    @property
    def seconds(self) -> float:
        """What they used, as far as it was looked at."""
        return sum(self._until[pid] - since for pid, since in self._since.items())


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64", "awq-w4-g64"], samples=32, length=256)
    add_model(parser, Shape(layers=4, hidden=1024, intermediate=2816))
    parser.add_argument("--workers", type=int, default=2, help="against one, default 2")
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        job = the_job(args, folder)
        numbers = sorted({1, args.workers})
        predicted = {number: simulate(planned(job), Cluster(1, number)) for number in numbers}
        runs = {number: _run(job, folder / f"run-{number}", number) for number in numbers}
    _report(predicted, runs)


def _run(job: Job, place: Path, workers: int) -> tuple[Timing, float]:
    with Conversion(job, place, workers) as run:
        cpu = CpuTime(run)
        return run.finish(cpu.look), cpu.seconds


def _report(predicted: dict[int, Prediction], runs: dict[int, tuple[Timing, float]]) -> None:
    pace = runs[1][0].work_s / predicted[1].seconds
    rows = []
    for number, (timing, cpu_s) in runs.items():
        seconds = predicted[number].seconds
        rows.append(
            [
                f"{number} workers",
                f"{seconds:.1f}",
                f"{timing.work_s:.1f}",
                f"{seconds / timing.work_s - 1:+.0%}",
                f"{pace * seconds / timing.work_s - 1:+.0%}",
                f"{predicted[number].busy_share * number * seconds:.1f}",
                f"{timing.busy_s:.1f}",
                f"{cpu_s:.1f}",
            ]
        )
    head = ["", "predicted s", "work s", "error", "error at this pace", "predicted busy s", "busy s", "CPU s"]
    print_table(head, rows)


if __name__ == "__main__":
    main()
