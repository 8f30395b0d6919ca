"""``bitmill convert``."""

from __future__ import annotations

import sys
from typing import Any

import click

from jobs.cli.flags import default_workers, spec_from_flags, with_spec_flags
from pipeline.errors import GateFailed, PipelineError


class WorkAddress(click.ParamType):  # type: ignore[type-arg]  # generic only to the checker
    """A directory, or ``s3://bucket/prefix`` as it is."""

    name = "address"
    _directory = click.Path(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the address, refused when it is a file."""
        return value if str(value).startswith("s3://") else self._directory.convert(value, param, ctx)


@click.command("convert")
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
    help="Read weights block by block from the hub, through a bounded cache on each machine, instead of fetching them "
    "to this disk first; never changes a byte.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where tensors are computed.",
)
@click.option("--address", metavar="ADDRESS", help="Ray cluster to run on.  [default: RAY_ADDRESS, else this machine]")
@click.option("--json", "as_json", is_flag=True, help="Progress as JSON lines on standard error.")
def convert_command(
    targets: tuple[str, ...],
    workers: int | None,
    work_dir: str | None,
    stream: bool,
    device: str,
    address: str | None,
    as_json: bool,
    **flags: Any,
) -> int:
    """Convert SOURCE and publish every variant that passes its gates.

    SOURCE is a Hugging Face folder or org/name[@revision] on the hub (HF_ENDPOINT and HF_TOKEN are honoured). The
    published folders are the last lines on standard output. The exit status is 0 only when every variant is
    published, and 5 when a gate failed.
    """
    from pipeline.observe.events import Failed
    from pipeline.observe.progress import ProgressMode, make_sink
    from pipeline.settings import load_settings

    spec = spec_from_flags(targets=targets, **flags)
    settings = load_settings()
    with_progress = make_sink(ProgressMode.JSON if as_json else ProgressMode.AUTO, sys.stderr)
    try:
        from pipeline.graph.convert import RunOptions, convert, resolve_device

        options = RunOptions(
            work_dir=work_dir or settings.cache_dir / "work",
            workers=workers or default_workers(),
            device=resolve_device(device),
            stream=stream,
            address=address or settings.ray_address,
        )
        outcomes = convert(spec, settings, options, with_progress)
    except PipelineError as error:
        with_progress.emit(Failed(error.code, error.message, error.hint))
        raise
    finally:
        with_progress.close()
    if not as_json:
        _summarize(outcomes)
    for outcome in outcomes:
        for location in outcome.locations:
            click.echo(location)
    failed = [outcome.facts for outcome in outcomes if not outcome.locations]
    if failed:
        reasons = "\n  ".join(f"{f.variant.name}: {c.name}: {c.detail}" for f in failed for c in f.verdict.failures)
        raise GateFailed(
            f"{len(failed)} of {len(outcomes)} variants did not pass their gates and are not published:\n  {reasons}",
            hint="set budgets under `gates` in a spec file (docs/reference/spec.md), or choose another variant",
        )
    return 0


def _summarize(outcomes: Any) -> None:
    from rich.console import Console

    from pipeline.publish.report import render_summary

    console = Console(stderr=True)
    for outcome in outcomes:
        console.print()
        render_summary(outcome.facts, console)
