"""What several variants in one run cost against one of them alone.

Runs the first variant, then all, then the same in reverse order, each in a fresh work directory. From the repository
root: ``.venv/bin/python benchmarks/variants.py [--model FOLDER] [--variant NAME ...]``
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace

from conversions import Conversion
from flags import add_model, add_order, job_parser, scratch_folder, the_job, there_and_back
from models import Shape
from report import print_header, print_table


def main() -> None:
    names = ["gptq-w4-g64", "gptq-w3-g64", "gptq-w8-g64", "awq-w4-g64"]
    parser = job_parser(__doc__, variants=names, samples=32, length=256)
    add_model(parser, Shape(layers=8, hidden=512, intermediate=1408))
    add_order(parser)
    parser.add_argument("--workers", type=int, default=2, help="default 2")
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        every = the_job(args, folder)
        first = replace(every, variants=every.variants[:1])
        jobs = {" ".join(job.variants): job for job in (first, every)}
        if len(jobs) < 2:
            parser.error("give --variant more than once: one of several is compared with all of them")
        timings = defaultdict(list)
        for kind in there_and_back(list(jobs), args.single):
            with Conversion(jobs[kind], folder / "run", args.workers) as run:
                timings[kind].append(run.finish())
            shutil.rmtree(folder / "run")
            print(f"work {timings[kind][-1].work_s:7.1f} s: {kind}", flush=True)
    rows, (base, _) = [], timings.values()
    for kind, own in timings.items():
        work_s, whole_s = (sum(getattr(timing, name) for timing in own) for name in ("work_s", "whole_s"))
        first_work_s, first_whole_s = (sum(getattr(timing, name) for timing in base) for name in ("work_s", "whole_s"))
        row = [kind, f"{work_s / len(own):.1f}", f"{work_s / first_work_s:.2f}"]
        rows.append([*row, f"{whole_s / len(own):.1f}", f"{whole_s / first_whole_s:.2f}"])
    print_table(["variants", "work s", "ratio", "whole command s", "ratio"], rows)


if __name__ == "__main__":
    main()
