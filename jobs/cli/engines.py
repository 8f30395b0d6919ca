"""``bitmill engines``."""

from __future__ import annotations

import json

import click

from jobs.cli.flags import HELP_NAMES
from pipeline.spec import Engine

ENGINES = [engine.value for engine in Engine]


@click.group("engines", context_settings=HELP_NAMES, short_help="Environments of the engines that check releases.")
def engines_command() -> None:
    """Environments of the engines that check releases.

    Each engine runs unmodified in a virtual environment of its own, in the cache directory (BITMILL_CACHE), with pinned
    packages. It is installed when it is needed first, or with bitmill engines install.
    """


@engines_command.command("list", context_settings=HELP_NAMES, short_help="The engines, and where they are.")
@click.option("--json", "as_json", is_flag=True, help="The engines as JSON.")
def list_command(as_json: bool) -> int:
    """The engines, whether they are installed, and where."""
    from pipeline.settings import load_settings
    from pipeline.validate.engines.environment import environment_folder, is_installed

    folders = {engine: environment_folder(engine, load_settings().cache_dir) for engine in ENGINES}
    if as_json:
        found = [
            {"engine": engine, "installed": is_installed(folder), "folder": str(folder)}
            for engine, folder in folders.items()
        ]
        click.echo(json.dumps(found, indent=2))
        return 0
    for engine, folder in folders.items():
        is_there = is_installed(folder)
        click.echo(f"{engine}  {folder if is_there else f'not installed: bitmill engines install {engine}'}")
    return 0


@engines_command.command("install", context_settings=HELP_NAMES, short_help="Install an ENGINE's environment.")
@click.argument("engine", type=click.Choice(ENGINES))
def install_command(engine: str) -> int:
    """Install the environment of an ENGINE unless it is there: some gigabytes, several minutes.

    The folder is the last line on standard output.
    """
    from pipeline.settings import load_settings
    from pipeline.validate.engines.environment import ensure_environment

    folder = ensure_environment(engine, load_settings().cache_dir, lambda line: click.echo(line, err=True))
    click.echo(str(folder))
    return 0
