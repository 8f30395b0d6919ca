"""The committed reference pages are what the code says, and the links of the pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.cli.reference import pages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["cli.md", "spec.md", "errors.md"])
def test_reference_is_current(name: str) -> None:
    committed = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert committed == pages()[name], "run `make docs`"


@pytest.mark.parametrize("page", ["README.md", *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
