"""Text from models, prompts and file names made safe to show."""

from __future__ import annotations

import unicodedata

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_KEPT_CONTROLS = "\n\t"
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Return the text with everything that would steer a terminal or hide text replaced by U+FFFD.

    Replaced are control characters other than newline and tab (an escape sequence starts with one), line and
    paragraph separators, lone surrogates (which no UTF-8 stream takes) and characters that reorder text.
    """
    return "".join(REPLACEMENT if _is_unsafe(character) else character for character in text)


def one_line(text: str) -> str:
    """Return ``printable(text)`` with every run of white space made one space."""
    return " ".join(printable(text).split())


def _is_unsafe(character: str) -> bool:
    if character in _KEPT_CONTROLS:
        return False
    return character in _BIDI_CONTROLS or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
