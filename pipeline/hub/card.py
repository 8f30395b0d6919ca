"""What a source's own card (README.md) says about its licence and ancestry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.hub.selection import CARD_FILE

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class SourceCard:
    """The statements of a card, as it makes them.

    Attributes:
        license: Licence identifier (``apache-2.0``, ``other``, ...); several are joined by ``, ``. None when it says
            nothing.
        license_name: Name of a licence that has no identifier, or None.
        base_models: Models that it says it was made from.
        problem: Why nothing could be read from a card that is there; empty otherwise.
    """

    license: str | None = None
    license_name: str | None = None
    base_models: tuple[str, ...] = ()
    problem: str = ""


def read_card(folder: Path) -> SourceCard:
    """Return what the README.md in a folder says; an absent one says nothing, an unreadable one has a problem."""
    try:
        return parse_card((folder / CARD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SourceCard()
    except (OSError, UnicodeDecodeError) as error:
        return SourceCard(problem=f"{CARD_FILE} cannot be read: {error}")


def parse_card(text: str) -> SourceCard:
    """Return what the YAML front matter of a card says."""
    match = _FRONT_MATTER.match(text)
    if match is None:
        return SourceCard()
    try:
        fields = yaml.safe_load(match["yaml"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: YAML turns text that looks like a date into one, also where there is no such day.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return SourceCard(problem=f"the front matter of {CARD_FILE} is not YAML: {reason}")
    if fields is None:
        return SourceCard()
    if not isinstance(fields, dict):
        return SourceCard(problem=f"the front matter of {CARD_FILE} is not a mapping")
    licenses = _texts(fields.get("license"))
    return SourceCard(
        license=", ".join(licenses) or None,
        license_name=", ".join(_texts(fields.get("license_name"))) or None,
        base_models=_texts(fields.get("base_model")),
    )


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item.strip() for item in values if isinstance(item, str) and item.strip())
