"""``bitmill``: the group of commands, and the one place where errors become messages and exit statuses.

Exit statuses: 0 done; 1 a bug of ours; 2 the command or spec; 3 the source; 4 text or plan; 5 a gate; 6 storage;
7 workers or cluster; 8 an engine; 130 interrupted, 143 terminated. ``pipeline/errors.py`` maps errors to them.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from jobs.cli.convert import convert_command
from jobs.cli.download import download_command
from jobs.cli.inspect import inspect_command
from jobs.cli.plan import plan_command
from jobs.cli.verify import verify_command
from pipeline.errors import PipelineError

TERMINATED_STATUS = 143
INTERRUPTED_STATUS = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="bitmill", prog_name="bitmill")
def cli() -> None:
    """Turn open-weight language models into verified, quantized releases.

    Start with: bitmill plan SOURCE --variant gptq-w4-g128, then bitmill convert with the same words and --to TARGET.
    """


cli.add_command(convert_command)
cli.add_command(plan_command)
cli.add_command(verify_command)
cli.add_command(inspect_command)
cli.add_command(download_command)


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds like an interrupt, so that clusters and locks are left properly."""


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its status."""
    signal.signal(signal.SIGTERM, _on_terminate)
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; messages go to standard error."""
    try:
        status: Any = cli.main(args=arguments, prog_name="bitmill", standalone_mode=False)
    except click.exceptions.Abort:
        return _say("interrupted; the same command continues where this one stopped", INTERRUPTED_STATUS)
    except KeyboardInterrupt:
        return _say("interrupted; the same command continues where this one stopped", INTERRUPTED_STATUS)
    except _Terminated:
        return _say("terminated; the same command continues where this one stopped", TERMINATED_STATUS)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PipelineError as error:
        return _say(f"error [{error.code}]: {error}", error.exit_status)
    return status if isinstance(status, int) else 0


def _say(message: str, status: int) -> int:
    click.echo(message, err=True)
    return status
