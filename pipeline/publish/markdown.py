"""Untrusted text in Markdown: names, prompts and continuations that can neither break the card nor format it.

The syntax is GitHub's (CommonMark with tables), which the hub renders.
"""

from __future__ import annotations

import re

from pipeline.observe.terminal import one_line, printable

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
_LINE_START = re.compile(r"^(#{1,6}|[-+]|=+|\d+[.)])(?=\s|$)")


def escape(text: str) -> str:
    """Return the text for running prose or a table cell: one line, every character shown as itself."""
    escaped = _SPECIAL.sub(r"\\\1", one_line(text))
    return _LINE_START.sub(lambda match: match[1][:-1] + "\\" + match[1][-1], escaped)


def code_span(text: str) -> str:
    """Return the text as inline code on one line, whatever backticks it holds."""
    line = one_line(text)
    if not line:
        return "(empty)"
    fence = "`" * (_longest_backticks(line) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_cell(text: str) -> str:
    """Return ``code_span`` for a table cell, where a bar ends the cell even inside code."""
    return code_span(text).replace("|", r"\|")


def fenced(text: str, language: str = "") -> str:
    """Return the text as a fenced block that nothing inside it closes."""
    shown = printable(text).rstrip("\n")
    fence = "`" * max(3, _longest_backticks(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
