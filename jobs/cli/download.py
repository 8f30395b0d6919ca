"""``bitmill download``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.cli.flags import HELP_NAMES
from pipeline.units import format_bytes

if TYPE_CHECKING:
    from pipeline.storage.manifest import ReleaseFile


@click.command("download", context_settings=HELP_NAMES, short_help="Copy a published RELEASE and check every file.")
@click.argument("release")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="What was copied, as JSON.")
def download_command(release: str, directory: Path, as_json: bool) -> int:
    """Copy a published RELEASE to DIRECTORY, which engines can then load.

    RELEASE is a revision folder, s3://bucket/.../REVISION, or TARGET/releases/NAMESPACE/NAME[@REF]. DIRECTORY is
    created where needed and may hold files of this release only: an interrupted download goes on. Every file is
    compared with the SHA-256 of the release's manifest, which is written last.
    """
    from pipeline.settings import load_settings
    from pipeline.storage.locate import download_release, locate_release, require_own_files

    located = locate_release(release, load_settings())
    require_own_files(located, directory)

    def say(file: ReleaseFile) -> None:
        if not as_json:
            click.echo(f"{file.path} ({format_bytes(file.size_bytes)})", err=True)

    download_release(located, directory, say)
    files = located.manifest.files
    if as_json:
        answer = {
            "release": f"{located.namespace}/{located.name}",
            "revision": located.revision,
            "directory": str(directory),
            "num_files": len(files),
            "size_bytes": sum(file.size_bytes for file in files),
        }
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(str(directory))
    return 0
