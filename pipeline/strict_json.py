"""JSON objects of strangers, read more strictly than ``json.loads``."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class DuplicateKeyError(ValueError):
    """A JSON object names the same key twice."""


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object, more strictly than ``json.loads``: UTF-8 only, no key twice, no NaN or Infinity.

    Raises:
        DuplicateKeyError: when an object names a key twice.
        ValueError: with the reason, whatever the bytes.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise DuplicateKeyError(f"the name {key!r:.200} occurs twice")
        mapping[key] = value
    return mapping


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text:.40} is out of range")
    return value
