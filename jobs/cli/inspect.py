"""``bitmill inspect``."""

from __future__ import annotations

import click

from jobs.cli.flags import HELP_NAMES


@click.command("inspect", context_settings=HELP_NAMES, short_help="Show a published RELEASE: figures, modules, card.")
@click.argument("release")
@click.option("--modules", is_flag=True, help="Also the table of every linear.")
@click.option("--card", is_flag=True, help="The card (README.md) as it is published.")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known of the release, as JSON.")
def inspect_command(release: str, modules: bool, card: bool, as_json: bool) -> int:
    """Show a published RELEASE: what it is, its figures, its modules, its card.

    RELEASE is a revision folder, s3://bucket/.../REVISION, or TARGET/releases/NAMESPACE/NAME[@REF].
    """
    from rich.console import Console

    from pipeline.graph.verify import inspect, read_card
    from pipeline.publish.report import facts_as_json, render_modules, render_summary
    from pipeline.settings import load_settings

    if card and not as_json:
        click.echo(read_card(release, load_settings()), nl=False)
        return 0
    located, facts = inspect(release, load_settings())
    if as_json:
        click.echo(facts_as_json(facts), nl=False)
    else:
        console = Console()
        console.print(located.uri, soft_wrap=True, highlight=False)
        render_summary(facts, console)
        if modules:
            render_modules(facts, console)
    return 0
