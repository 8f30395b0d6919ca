"""Untrusted text in Markdown, read back by a CommonMark parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.observe.terminal import one_line, printable
from pipeline.publish.markdown import code_cell, code_span, escape, fenced

PARSER = MarkdownIt("commonmark").enable("table").enable("strikethrough")
HOSTILE = st.text(alphabet=st.sampled_from(list("`*_[]()<>|~&$#+-=!\\.1 a\n\t\x1b")), max_size=30)


@pytest.mark.parametrize(
    "text",
    [
        "# heading",
        "- item",
        "1. item",
        "+",
        "===",
        "> quote",
        "*a* _b_ **c** ~~d~~",
        "![x](https://example.org/x.png)",
        "<script>alert(1)</script>",
        "&lt;",
        "a | b",
        "`code`",
        "back\\slash",
    ],
)
def test_escaped_text_is_shown_as_itself(text: str) -> None:
    tokens = PARSER.parse(escape(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == text


@given(HOSTILE)
def test_escaped_text_never_formats(text: str) -> None:
    tokens = PARSER.parse(f"before {escape(text)} after")
    children = tokens[1].children or []
    assert "".join(child.content for child in children).split() == f"before {one_line(text)} after".split()
    assert {child.type for child in children} <= {"text", "text_special"}


@given(HOSTILE)
def test_a_cell_stays_one_cell(text: str) -> None:
    table = f"| a | b |\n|---|---|\n| {escape(text)} | {code_cell(text)} |\n"
    types = [token.type for token in PARSER.parse(table)]
    assert types.count("td_open") == 2
    assert types.count("tr_open") == 2


@given(HOSTILE)
def test_a_code_span_holds_the_text(text: str) -> None:
    children = PARSER.parseInline(f"x {code_span(text)} y")[0].children or []
    spans = [child.content for child in children if child.type == "code_inline"]
    assert spans == ([one_line(text)] if one_line(text) else [])


@given(HOSTILE)
def test_nothing_closes_a_fence_from_inside(text: str) -> None:
    tokens = PARSER.parse(f"{fenced(text, 'text')}\n\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    shown = printable(text).rstrip("\n")
    assert tokens[0].content.rstrip("\n") == shown
