"""What the command line says when it is asked for help, or words are missing."""

from __future__ import annotations

import pytest

from jobs.cli import main
from jobs.cli.main import cli, run


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_list_of_commands_says_every_summary_in_full(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"], prog_name="bitmill", standalone_mode=False, terminal_width=columns)
    said = capsys.readouterr().out
    listed = said[said.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in listed if line.strip()] == sorted(cli.commands)
    assert [line for line in listed if "..." in line] == []


@pytest.mark.parametrize(
    ("words", "missing", "example"),
    [
        (["plan"], "SOURCE", "bitmill plan org/model --variant gptq-w4-g128 ;"),
        (["plan", "org/model"], "--variant NAME", "bitmill plan org/model --variant gptq-w4-g128 ;"),
        (["convert"], "SOURCE", "bitmill convert org/model --variant gptq-w4-g128 --to releases/ ;"),
        (["convert", "org/model", "--variant", "gptq-w4-g128"], "--to TARGET", "--to releases/"),
    ],
)
def test_a_missing_word_is_answered_with_the_command_that_was_meant(
    words: list[str], missing: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(words) == 2
    said = capsys.readouterr().err
    assert f"{missing} is missing" in said
    assert example in said


def test_plan_does_not_suggest_what_it_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan"])
    assert "convert" not in capsys.readouterr().err
