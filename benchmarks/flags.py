"""Flags that benchmarks of conversions share, and what they mean."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conversions import Job
from models import Shape, make_llama
from sessions import exit_on_sigterm


def there_and_back(kinds: Sequence[str], single: bool) -> list[str]:
    """Return the order of measurements: A B B A, so that a machine that gets slower or faster favours none."""
    return list(kinds) if single else [*kinds, *reversed(kinds)]


def job_parser(text: str | None, *, variants: Sequence[str], samples: int, length: int) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks of conversions take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", dest="variants", help=f"default: {' '.join(variants)}")
    parser.add_argument("--samples", type=int, default=samples, help=f"calibration sequences, default {samples}")
    parser.add_argument("--length", type=int, default=length, help=f"tokens of a sequence, default {length}")
    parser.add_argument("--scratch", type=Path, help="where a folder is made and removed again, default: $TMPDIR")
    parser.set_defaults(default_variants=tuple(variants))
    return parser


def add_model(parser: argparse.ArgumentParser, shape: Shape) -> None:
    """Add the flags that say which model is converted."""
    parser.add_argument("--model", type=Path, help="a model folder, default: a random Llama of these sizes:")
    parser.add_argument("--layers", type=int, default=shape.layers, help=f"default {shape.layers}")
    parser.add_argument("--hidden", type=int, default=shape.hidden, help=f"default {shape.hidden}")
    parser.add_argument("--intermediate", type=int, default=shape.intermediate, help=f"default {shape.intermediate}")


def add_order(parser: argparse.ArgumentParser) -> None:
    """Add the flag that measures everything once."""
    parser.add_argument("--single", action="store_true", help="measure everything once, not there and back")


@contextmanager
def scratch_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Give a folder that is removed at the end, also when the process is told to end."""
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bitmill-bench-", dir=args.scratch, ignore_cleanup_errors=True) as name:
        yield Path(name)


def the_job(args: argparse.Namespace, folder: Path) -> Job:
    """Return the job that flags mean; a random model is made in ``folder``."""
    source = args.model.absolute() if args.model else None
    if source is None:
        source = make_llama(folder / "model", Shape(args.layers, args.hidden, args.intermediate))
    return Job(source, variants_of(args), args.samples, args.length)


def variants_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the variants that flags mean."""
    return tuple(args.variants or args.default_variants)
