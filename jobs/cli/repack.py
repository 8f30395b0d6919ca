"""``bitmill repack``."""

from __future__ import annotations

import json

import click

from jobs.cli.flags import HELP_NAMES
from pipeline.observe.events import ClosingSink, Event
from pipeline.observe.phrases import announce
from pipeline.spec import Format


class _Lines(ClosingSink):
    """Says on standard error what deserves a line."""

    def emit(self, event: Event) -> None:
        if (said := announce(event)) is not None:
            click.echo(said.text, err=True)


@click.command("repack", context_settings=HELP_NAMES, short_help="Publish a RELEASE in another checkpoint format.")
@click.argument("release")
@click.option(
    "--format",
    "format_",
    required=True,
    type=click.Choice([format_.value for format_ in Format]),
    help="The format.",
)
@click.option(
    "--to",
    "targets",
    multiple=True,
    required=True,
    metavar="TARGET",
    help="Directory or s3://bucket/prefix to publish to. Repeatable.",
)
@click.option("--release", "address", metavar="NAMESPACE/NAME", help="What to call it.  [default: as the old one]")
@click.option("--json", "as_json", is_flag=True, help="What came of it as JSON.")
def repack_command(release: str, format_: str, targets: tuple[str, ...], address: str | None, as_json: bool) -> int:
    """Publish a RELEASE in another checkpoint format, without solving anything again.

    RELEASE is a revision folder, s3://bucket/.../REVISION, or TARGET/releases/NAMESPACE/NAME[@REF]. Codes, scales and
    zero points stay as they are, and are proven to; a format that cannot hold them is refused. The published folders
    are the last lines on standard output.
    """
    from pipeline.graph.convert import open_targets
    from pipeline.graph.repack import repack
    from pipeline.settings import load_settings

    settings = load_settings()
    stores = open_targets(targets, settings, _Lines())
    found = repack(release, Format(format_), stores, address or "", settings, lambda line: click.echo(line, err=True))
    if as_json:
        stated = {"release": found.facts.release, "repacked_from": found.facts.repacked_from}
        click.echo(json.dumps({**stated, "locations": list(found.locations)}, indent=2))
        return 0
    for location in found.locations:
        click.echo(location)
    return 0
