"""``bitmill``: the group of commands, and the one place where errors become messages and exit statuses.

Exit statuses: 0 done; 1 a bug of ours; 2 the command or spec; 3 the source; 4 text or plan; 5 a gate; 6 storage;
7 workers or cluster; 8 an engine; 130 interrupted, 143 terminated. ``pipeline/errors.py`` maps errors to them.

``bitmill convert --json`` promises events and nothing else on standard error, so its failures are said here as events,
whatever they are: words that click refuses, a spec that cannot be read, a gate, a signal.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from jobs.cli.cancel import cancel_command
from jobs.cli.convert import convert_command
from jobs.cli.download import download_command
from jobs.cli.engines import engines_command
from jobs.cli.flags import HELP_NAMES
from jobs.cli.inspect import inspect_command
from jobs.cli.plan import plan_command
from jobs.cli.recommend import recommend_command
from jobs.cli.repack import repack_command
from jobs.cli.verify import verify_command
from pipeline.errors import PipelineError
from pipeline.observe.events import Failed, to_json

CONTINUES = "the same command continues where this one stopped"
TERMINATED_STATUS = 143
INTERRUPTED_STATUS = 130


_received: list[int] = []
"""The signals that have asked this process to stop, besides an interrupt from the keyboard."""


class _Stopped(BaseException):
    """An interrupt that has left the command, its clusters and locks behind it."""


class _Commands(click.Group):
    """The commands, with interrupts of our own: click would put an empty line on standard error."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the words name."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Stopped from error


@click.group(cls=_Commands, context_settings={**HELP_NAMES, "max_content_width": 100})
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
cli.add_command(cancel_command)
cli.add_command(engines_command)
cli.add_command(recommend_command)
cli.add_command(repack_command)


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind as for an interrupt, so that clusters and locks are left properly.

    Raises:
        KeyboardInterrupt: the one exception that Ray lets through its own waits, and not as the object that was raised.
            Hence the list, which says what it was.
    """
    _received.append(number)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its status."""
    signal.signal(signal.SIGTERM, _on_terminate)
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; messages go to standard error."""
    words = sys.argv[1:] if arguments is None else arguments
    # Looked for by hand, because click may refuse the words before it has read the flag.
    as_json = words[:1] == ["convert"] and "--json" in words
    try:
        status: Any = cli.main(args=words, prog_name="bitmill", standalone_mode=False)
    except (_Stopped, click.exceptions.Abort, KeyboardInterrupt):
        if signal.SIGTERM in _received:
            return _stop("terminated", TERMINATED_STATUS, as_json)
        return _stop("interrupted", INTERRUPTED_STATUS, as_json)
    except click.ClickException as error:
        if as_json:
            _say_event("usage", error.format_message(), "see bitmill convert --help")
        else:
            error.show()
        return error.exit_code
    except PipelineError as error:
        if as_json:
            _say_event(error.code, error.message, error.hint)
        else:
            click.echo(f"error [{error.code}]: {error}", err=True)
        return error.exit_status
    return status if isinstance(status, int) else 0


def _stop(word: str, status: int, as_json: bool) -> int:
    """Say that a signal ends the command, and return the status to end with."""
    if as_json:
        _say_event(word, word, CONTINUES)
    else:
        click.echo(f"{word}; {CONTINUES}", err=True)
    return status


def _say_event(code: str, message: str, hint: str) -> None:
    click.echo(to_json(Failed(code, message, hint)), err=True)
