"""A whole conversion on one GPU: seconds by kind of work, peak memory on the GPU and in the process.

By default the sizes of Llama-3.1-8B with random weights, 128 x 2048 tokens, GPTQ w4 g128. The model is written first
(16 GB below ``--scratch``); read, solved, packed and published in the time that is told. What the gates ask for
(passes over held-out text, continuations) is told apart. One worker, in this process; or several that share the GPU, so
that one stores what it has made while another one computes.

From the repository root: ``.venv/bin/python benchmarks/gpu.py``. To try it without a GPU:
``--device cpu --layers 2 --hidden 512 --intermediate 1024 --samples 8 --length 128``
"""

from __future__ import annotations

import resource
import time
from dataclasses import replace

import torch
from conversions import Job
from flags import add_model, job_parser, scratch_folder, variants_of
from hotspots import Stages
from models import LLAMA_8B, make_llama
from report import print_header, print_table

from pipeline.graph.convert import RunOptions, convert
from pipeline.observe.events import Phase
from pipeline.settings import load_settings
from pipeline.spec import build_spec
from pipeline.units import format_bytes


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g128"], samples=128, length=2048)
    add_model(parser, LLAMA_8B)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=1, help="that share the GPU, default 1: in this process")
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        sizes = {"layers": args.layers, "hidden": args.hidden, "intermediate": args.intermediate}
        source = args.model.absolute() if args.model else make_llama(folder / "model", replace(LLAMA_8B, **sizes))
        job = Job(source, variants_of(args), args.samples, args.length)
        options = RunOptions(folder / "work", args.workers, args.device, inline=args.workers == 1)
        stages, start_s = Stages(), time.monotonic()
        convert(build_spec(job.spec(folder / "out"), "benchmark"), load_settings(), options, stages)
        whole_s = time.monotonic() - start_s
    judged_s = stages.seconds[Phase.EVALUATE.value]
    print_table(["work", "units", "s", "share"], stages.rows(whole_s))
    print(f"whole {whole_s:.1f} s; without what the gates ask for {whole_s - judged_s:.1f} s")
    most = [f"{format_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} in the process"]
    if args.device == "cuda" and args.workers == 1:
        most.append(f"{format_bytes(torch.cuda.max_memory_allocated())} on {torch.cuda.get_device_name()}")
    print(f"most memory: {', '.join(most)}")


if __name__ == "__main__":
    main()
