"""``bitmill convert``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from jobs.cli.flags import HELP_NAMES, default_workers, spec_from_flags, with_spec_flags
from pipeline.errors import GateFailed, PipelineError
from pipeline.observe.events import ClosingSink, Event, EventSink, Failed, Published
from pipeline.units import parse_bytes

if TYPE_CHECKING:
    from pipeline.graph.convert import VariantOutcome
    from pipeline.settings import Settings
    from pipeline.spec import ConversionSpec


class WorkAddress(click.ParamType):  # type: ignore[type-arg]  # generic only to the checker
    """A directory, or ``s3://bucket/prefix`` as it is."""

    name = "address"
    _directory = click.Path(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the address, refused when it is a file."""
        return value if str(value).startswith("s3://") else self._directory.convert(value, param, ctx)


@click.command("convert", context_settings=HELP_NAMES, short_help="Convert SOURCE and publish what passes its gates.")
@with_spec_flags
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="Where to publish: a directory or s3://bucket/prefix. Repeatable.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="K",
    help="Work units at a time; never changes a byte.  [default: processors]",
)
@click.option(
    "--work-dir",
    type=WorkAddress(),
    metavar="PLACE",
    help="Finished work of this and earlier runs: a directory that every worker reaches, or s3://bucket/prefix. A "
    "killed run continues from it, from any machine.  [default: work/ in the cache directory]",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Read weights block by block from the hub or bucket, through a bounded cache on each machine, instead of "
    "fetching them to this disk first; never changes a byte.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Memory of a worker, for example 1.5GB: work is cut so that it fits, what waits for others goes to disk, a "
    "machine gets no more workers than it has memory for, and a conversion that needs more is refused before anything "
    "is fetched; never changes a byte.  [default: as much as it takes]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where tensors are computed.",
)
@click.option("--address", metavar="ADDRESS", help="Ray cluster to run on.  [default: RAY_ADDRESS, else this machine]")
@click.option("--json", "as_json", is_flag=True, help="Events as JSON lines, and nothing else, on standard error.")
def convert_command(
    targets: tuple[str, ...],
    workers: int | None,
    work_dir: str | None,
    stream: bool,
    max_memory: str | None,
    device: str,
    address: str | None,
    as_json: bool,
    **flags: Any,
) -> int:
    """Convert SOURCE and publish every variant that passes its gates.

    SOURCE is a Hugging Face folder, org/name[@revision] on the hub (HF_ENDPOINT and HF_TOKEN are honoured), or
    s3://bucket/prefix with the files of such a folder (credentials and AWS_ENDPOINT_URL_S3 as for targets). The
    published folders are the last lines on standard output. The exit status is 0 only when every variant is
    published, and 5 when a gate failed.
    """
    from pipeline.observe.progress import ProgressMode, make_sink
    from pipeline.settings import load_settings

    spec = spec_from_flags(command="convert", targets=targets, **flags)
    settings = load_settings()
    with_progress = _Locations(make_sink(ProgressMode.JSON if as_json else ProgressMode.AUTO, sys.stderr))
    try:
        with with_progress:
            try:
                outcomes = _convert(
                    spec, settings, with_progress, workers, work_dir, device, address, stream, max_memory
                )
            except PipelineError as error:
                if not as_json:  # there the command line says every failure, as the last event
                    with_progress.emit(Failed(error.code, error.message, error.hint))
                raise
        if not as_json:
            _summarize(outcomes)
    finally:
        # However the command ends, what is published is said.
        for location in with_progress.locations:
            click.echo(location)
    failed = [outcome.facts for outcome in outcomes if not outcome.locations]
    if failed:
        reasons = "\n  ".join(f"{f.variant.name}: {c.name}: {c.detail}" for f in failed for c in f.verdict.failures)
        raise GateFailed(
            f"{len(failed)} of {len(outcomes)} variants did not pass their gates and are not published:\n  {reasons}",
            hint="set budgets under `gates` in a spec file (docs/reference/spec.md), or choose another variant",
        )
    return 0


def _convert(
    spec: ConversionSpec,
    settings: Settings,
    sink: EventSink,
    workers: int | None,
    work_dir: str | None,
    device: str,
    address: str | None,
    stream: bool,
    max_memory: str | None,
) -> tuple[VariantOutcome, ...]:
    """Run the conversion with what the flags leave open decided."""
    from pipeline.graph.convert import RunOptions, convert, resolve_device

    options = RunOptions(
        work_dir=work_dir or settings.cache_dir / "work",
        workers=workers or default_workers(),
        device=resolve_device(device),
        stream=stream,
        address=address or settings.ray_address,
        max_memory_bytes=parse_bytes(max_memory) if max_memory else None,
    )
    return convert(spec, settings, options, sink)


class _Locations(ClosingSink):
    """Remembers where releases were published, and passes every event on."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.locations: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Published):
            self.locations.append(event.location)
        self._sink.emit(event)

    def close(self) -> None:
        self._sink.close()


def _summarize(outcomes: Iterable[VariantOutcome]) -> None:
    from rich.console import Console

    from pipeline.publish.report import render_summary

    console = Console(stderr=True)
    for outcome in outcomes:
        console.print()
        render_summary(outcome.facts, console)
