"""What a rerun costs after everything was killed half-way.

Runs the job undisturbed; again in a fresh work directory for half of the time that its work took, when the driver, its
workers and Ray get SIGKILL; runs that one to its end; and undisturbed once more. Exits with 1 when the published bytes
differ. From the repository root: ``.venv/bin/python benchmarks/resume.py [--model FOLDER] [--at 0.5]``
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from conversions import POLL_S, Conversion, Job, Timing, release_digests
from flags import add_model, add_order, job_parser, scratch_folder, the_job
from models import Shape
from report import print_header, print_table
from sessions import kill_session


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64"], samples=32, length=256)
    add_model(parser, Shape(layers=8, hidden=512, intermediate=1408))
    add_order(parser)
    parser.add_argument("--workers", type=int, default=2, help="default 2")
    parser.add_argument(
        "--at", type=float, default=0.5, help="share of the undisturbed work's time at the kill, default 0.5"
    )
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        job = the_job(args, folder)
        whole = [_run(job, folder / "undisturbed", args.workers)]
        killed = _run_for(args.at * whole[0].work_s, job, folder / "killed", args.workers)
        rerun = _run(job, folder / "killed", args.workers)
        if not args.single:
            whole.append(_run(job, folder / "again", args.workers))
        expected, found = release_digests(folder / "undisturbed"), release_digests(folder / "killed")
    undisturbed = [sum(getattr(run, name) for run in whole) / len(whole) for name in ("work_s", "busy_s", "whole_s")]
    rows = [_row(f"undisturbed {number}", run, undisturbed) for number, run in enumerate(whole, 1)]
    rows += [_row("until the kill", killed, undisturbed), _row("rerun", rerun, undisturbed)]
    print_table(["run", "units", "work s", "share", "in units s", "share", "whole command s", "share"], rows)
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    print(
        f"{len(expected)} published files, " + (f"differing: {', '.join(differing)}" if differing else "all identical")
    )
    sys.exit(1 if differing or not expected else 0)


def _run(job: Job, place: Path, workers: int) -> Timing:
    with Conversion(job, place, workers) as run:
        return run.finish()


def _run_for(work_s: float, job: Job, place: Path, workers: int) -> Timing:
    """Run a job until its workers have worked for so long, and kill it.

    Raises:
        RuntimeError: when it ended before that.
    """
    with Conversion(job, place, workers) as run:
        while run.worked_s < work_s:
            if not run.is_running:
                raise RuntimeError(f"the conversion ended before it could be killed: {run.talk[-20:]}")
            time.sleep(POLL_S)
        kill_session(run.session)
        run.close()
        return run.timing()


def _row(name: str, run: Timing, undisturbed: list[float]) -> list[str]:
    figures = (
        f"{value:.1f} {value / base:.0%}".split()
        for value, base in zip((run.work_s, run.busy_s, run.whole_s), undisturbed)
    )
    return [name, str(run.num_units), *(cell for pair in figures for cell in pair)]


if __name__ == "__main__":
    main()
