"""A source's card is quoted, never guessed from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.hub.card import SourceCard, parse_card, read_card


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("---\nlicense: mit\n---\n# x", SourceCard(license="mit")),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# x", SourceCard(license="mit")),
        ("---\nlicense: [mit, apache-2.0]\n---\n", SourceCard(license="mit, apache-2.0")),
        (
            "---\nlicense: other\nlicense_name: own-1.0\nbase_model:\n- a/b\n- c/d\n---\n",
            SourceCard(license="other", license_name="own-1.0", base_models=("a/b", "c/d")),
        ),
        ("---\nbase_model: a/b\nlicense: 3\n---", SourceCard(base_models=("a/b",))),
        ("# no front matter\n---\nlicense: mit\n---\n", SourceCard()),
        ("---\n---\ntext", SourceCard()),
        ("---\nlicense: mit\n", SourceCard()),
        ("", SourceCard()),
    ],
)
def test_statements_are_read(text: str, card: SourceCard) -> None:
    assert parse_card(text) == card


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("---\nlicense: [mit\n---\n", "is not YAML"),
        ("---\ndate: 2024-13-45\n---\n", "is not YAML"),
        ("---\nx: !!python/object/apply:os.system ['true']\n---\n", "is not YAML"),
        ("---\n" + "[" * 5000 + "\n---\n", "is not YAML"),
        ("---\n- mit\n---\n", "is not a mapping"),
    ],
)
def test_an_unreadable_card_has_a_problem_and_says_nothing(text: str, problem: str) -> None:
    card = parse_card(text)
    assert problem in card.problem
    assert card == SourceCard(problem=card.problem)


def test_cards_of_folders(tmp_path: Path) -> None:
    assert read_card(tmp_path) == SourceCard()
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert "cannot be read" in read_card(tmp_path).problem
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_card(tmp_path) == SourceCard(license="mit")


def test_the_demo_model_states_its_licence() -> None:
    card = read_card(Path(__file__).parents[3] / "jobs" / "demo" / "model")
    assert card == SourceCard(license="apache-2.0")
