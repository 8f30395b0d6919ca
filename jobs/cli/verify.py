"""``bitmill verify``."""

from __future__ import annotations

import json

import click

from jobs.cli.flags import HELP_NAMES
from pipeline.errors import GateFailed
from pipeline.spec import Engine


@click.command("verify", context_settings=HELP_NAMES, short_help="Check a published RELEASE from its storage alone.")
@click.argument("release")
@click.option(
    "--engine",
    type=click.Choice([engine.value for engine in Engine]),
    help="Also load it in this engine, unmodified, in an environment of its own (installed on first use).",
)
@click.option("--json", "as_json", is_flag=True, help="The checks as JSON.")
def verify_command(release: str, engine: str | None, as_json: bool) -> int:
    """Check a published RELEASE from its storage alone.

    RELEASE is a revision folder, s3://bucket/.../REVISION, or TARGET/releases/NAMESPACE/NAME[@REF]. Checked are
    digests, structure, scales, and with the project's own loader whether the weights choose the recorded
    continuations. Exit status 5 when one fails.
    """
    from pipeline.graph.verify import verify
    from pipeline.settings import load_settings

    found = verify(release, engine, load_settings(), lambda line: click.echo(line, err=True))
    if as_json:
        checks = [check.model_dump(mode="json") for check in found.checks]
        click.echo(json.dumps({"release": found.release, "revision": found.revision, "checks": checks}, indent=2))
    else:
        click.echo(f"{found.release} {found.revision}")
        for check in found.checks:
            click.echo(f"  {'passed' if check.passed else 'FAILED'}  {check.name:<12} {check.detail}")
    if not found.passed:
        names = ", ".join(check.name for check in found.checks if not check.passed)
        raise GateFailed(f"{found.release} did not pass: {names}", hint="publish it again, or withdraw it from use")
    return 0
