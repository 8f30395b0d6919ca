"""``bitmill cancel``."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import click

from jobs.cli.flags import HELP_NAMES

POLL_S = 0.5


@click.command("cancel", context_settings=HELP_NAMES, short_help="Stop a running JOB, or list the running ones.")
@click.argument("job", required=False)
@click.option(
    "--work-dir",
    metavar="PLACE",
    help="Where the job keeps its work: a directory or s3://bucket/prefix.  [default: work/ in the cache directory]",
)
@click.option("--wait", "wait_s", type=float, default=0.0, metavar="S", help="Wait up to S seconds for it to stop.")
@click.option("--json", "as_json", is_flag=True, help="The jobs as JSON.")
def cancel_command(job: str | None, work_dir: str | None, wait_s: float, as_json: bool) -> int:
    """Stop a running JOB within one work unit; without JOB, list the running ones.

    Nothing that is finished is lost: the same convert command continues where it stopped. A publication that is under
    way is completed.
    """
    from pipeline.settings import load_settings
    from pipeline.storage.objects import open_store
    from pipeline.storage.running import cancel_job, list_jobs

    settings = load_settings()
    store = open_store(work_dir or str(settings.cache_dir / "work"), settings)
    if job is None:
        jobs = list_jobs(store, datetime.now(UTC))
        if as_json:
            click.echo(json.dumps([item.model_dump(mode="json") for item in jobs], indent=2))
            return 0
        for item in jobs:
            click.echo(f"{item.id}  {item.source}  {', '.join(item.variants)}  {item.host}:{item.pid}")
        if not jobs:
            click.echo(f"no job runs on {store.url}", err=True)
        return 0
    found = cancel_job(store, job, datetime.now(UTC))
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and any(item.id == job for item in list_jobs(store, datetime.now(UTC))):
        time.sleep(POLL_S)
    has_stopped = all(item.id != job for item in list_jobs(store, datetime.now(UTC)))
    if as_json:
        click.echo(json.dumps({"job": found.model_dump(mode="json"), "has_stopped": has_stopped}, indent=2))
    else:
        click.echo(f"{job} of {found.source} {'has stopped' if has_stopped else 'was told to stop'}")
    return 0
