"""Bitmill against other tools, on one machine, with the same tokens.

Makes an environment for each peer on first use (about 1.6 GB each), lets every tool make every checkpoint, one after
the other, scores them all with one decoder, prints one table and draws one picture. What is in the folder --out already
is not made again. Run from the repository root with nothing else running:

    python -m benchmarks.peers --model FOLDER --calibration TEXT --heldout TEXT --out peers

Any Hugging Face folder of a dense decoder model on this disk will do. Without flags it is the shipped demo model on the
shipped texts, which says that everything works and nothing of any quality. Table and picture show what earlier calls
made for the same job, too.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.jobs import AS_STORED, ROOT, Job, Task, Tokens, Tool, all_tasks, take_sequences
from benchmarks.peers.report import Entry, draw, print_results
from benchmarks.peers.results import Results
from benchmarks.peers.runs import digest_checkpoint, run_task
from benchmarks.report import print_header
from benchmarks.sessions import exit_on_sigterm
from pipeline.precision import Precision

if TYPE_CHECKING:
    from benchmarks.peers.scoring import Scorer

DEMO_MODEL = ROOT / "jobs" / "demo" / "model"
TEXTS = ROOT / "pipeline" / "calibrate" / "data"
DTYPES = (AS_STORED, "float32")
CODE = Path(tarfile.__file__)
"""Source code that lies on every machine with Python."""


def main(words: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(words)
    exit_on_sigterm()
    args.model, args.out = args.model.resolve(), args.out.resolve()
    everything = all_tasks(args.autoround_iterations, args.peers_dtype)
    tasks = [task for task in everything if not args.only or task.tool in args.only]
    if args.grid:
        tasks = [task for task in tasks if task.grid.name.replace(" ", "-") in args.grid]
    if args.task:
        unknown = set(args.task) - {task.name for task in tasks}
        if unknown:
            raise SystemExit(f"no {', '.join(sorted(unknown))} among {', '.join(task.name for task in tasks)}")
        tasks = [task for task in tasks if task.name in args.task]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    print_header()
    encode = _encoder(args.model)
    tokens = take_sequences(args.calibration, encode, args.samples, args.length)
    texts = _texts(args, encode)
    heldout = args.heldout.resolve(), args.heldout_samples
    job = Job(args.model, args.calibration.resolve(), tokens, *heldout, args.cores, args.precision)
    results = Results(args.out)
    for task in tasks:
        _run(job, task, args, results)
    known = dict.fromkeys(task for dtype in DTYPES for task in all_tasks(args.autoround_iterations, dtype))
    shown = [task for task in known if task in tasks or results.runs(job.key(task))]
    entries = _score(job, shown, texts, args.out, results)
    print_results(entries, [text.name for text in texts])
    if any(entry.scores for entry in entries):
        picture = args.out / "peers.png"
        draw(entries, texts[0].name, picture)
        print(f"rows {args.out / 'results.jsonl'}, picture {picture}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--calibration", type=Path, default=TEXTS / "calibration.txt", help="a text file")
    parser.add_argument("--heldout", type=Path, default=TEXTS / "heldout.txt", help="a text file to score on")
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        help=f"another text to score on, repeatable; default: the shipped held-out text and Python's {CODE.name}",
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences, default 32")
    parser.add_argument("--heldout-samples", type=int, default=16, help="scored sequences of a text, default 16")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, default 512")
    parser.add_argument("--only", type=Tool, action="append", help=f"a tool, repeatable: {', '.join(Tool)}")
    parser.add_argument("--grid", action="append", help="w4-g64-sym, w3-g64-sym or w4-g64-asym, repeatable")
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="only this checkpoint, as its folder is called, repeatable; for example bitmill-gptq-w4-g64-sym-seq",
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs of every task, default 1; the median is shown")
    parser.add_argument("--cores", type=int, default=cores, help=f"processors and threads for each, default {cores}")
    parser.add_argument(
        "--precision",
        type=Precision,
        default=Precision.BFLOAT16,
        choices=list(Precision),
        help="of Bitmill's passes over text, default bfloat16; in float32 it states what the referee finds",
    )
    parser.add_argument(
        "--peers-dtype",
        default=AS_STORED,
        choices=DTYPES,
        help="in what peers hold the model, default auto: as it is stored. Without bfloat16 instructions a processor "
        "is many times slower in that than in float32",
    )
    parser.add_argument("--autoround-iterations", type=int, help="steps for each block; default: AutoRound's own")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="rows, logs and checkpoints, default peers/")
    parser.add_argument("--environments", type=Path, help="virtual environments, default OUT/environments")
    return parser


def _encoder(model: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _texts(args: argparse.Namespace, encode: Callable[[str], list[int]]) -> list[Tokens]:
    """Return what is scored on, each text once, the held-out text first."""
    files = [args.heldout, *(args.also or [TEXTS / "heldout.txt", CODE])]
    different = dict.fromkeys(file.resolve() for file in files)
    return [take_sequences(file, encode, args.heldout_samples, args.length, or_fewer=True) for file in different]


def _run(job: Job, task: Task, args: argparse.Namespace, results: Results) -> None:
    """A task has run as often as was asked for, unless it fails."""
    key = job.key(task)
    environments = args.environments or args.out / "environments"
    for number in range(len(results.runs(key)), args.repeat):
        print(f"{task.name}: run {number + 1} of {args.repeat}", flush=True)
        row = run_task(job, task, args.out, environments.resolve())
        results.add(row)
        print(f"  exit status {row['exit_status']}, {row['wall_s']:.0f} s", flush=True)
        if row["exit_status"]:
            return


def _score(job: Job, tasks: Sequence[Task], texts: Sequence[Tokens], out: Path, results: Results) -> list[Entry]:
    """Return all that is known of the tasks, after scoring what had no score yet."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.peers.scoring import Scorer

    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(job.cores)
    with tempfile.TemporaryDirectory(prefix="bitmill-logits-", dir=out) as scratch:
        scorer = Scorer(job.model, Path(scratch))
        return [_entry(scorer, job, task, texts, out, results) for task in tasks]


def _entry(scorer: Scorer, job: Job, task: Task, texts: Sequence[Tokens], out: Path, results: Results) -> Entry:
    from benchmarks.peers.decoder import UnreadableCheckpointError
    from benchmarks.peers.scoring import score_key

    key, source = job.key(task), digest_checkpoint(job.model)
    runs = results.runs(key)
    if not runs:
        return Entry(task, [], [], results.failure(key))
    keys = [score_key(runs[-1]["checkpoint"], source, text) for text in texts]
    missing = {own: text for own, text in zip(keys, texts, strict=True) if results.score(own) is None}
    if missing:
        folder = out / "checkpoints" / task.name
        if not folder.is_dir() or digest_checkpoint(folder) != runs[-1]["checkpoint"]:
            return Entry(
                task, runs, [], f"{folder} is not what the last run wrote; run it again with a higher --repeat"
            )
        print(f"{task.name}: scoring {', '.join(text.name for text in missing.values())}", flush=True)
        try:
            found = scorer.score(folder, list(missing.values()))
        except UnreadableCheckpointError as error:
            return Entry(task, runs, [], str(error))
        for (own, text), score in zip(missing.items(), found, strict=True):
            results.add({"kind": "score", "key": own, "task": task.name, "text": text.name, **score})
    return Entry(task, runs, [row for own in keys if (row := results.score(own)) is not None])


if __name__ == "__main__":
    main()
