"""The base of every spec, what its fields share, and its validation errors in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """Base of every spec: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)


def regular_expression(text: str) -> str:
    """Return the text when it is a regular expression; for a field's validator.

    Raises:
        ValueError: with what is wrong and where.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


def problems(error: ValidationError, root: type[Strict]) -> Iterator[str]:
    """Yield one line for each problem of a ``root``: its key, the reason, and the legal keys of an unknown one."""
    found = error.errors()
    for item in found:
        place = item["loc"]
        if item["type"] == "too_short" and any(other["loc"][: len(place)] == place != other["loc"] for other in found):
            continue  # pydantic does not count entries that are wrong themselves
        where = ".".join(str(part) for part in place)
        if item["type"] == "extra_forbidden":
            yield f"{where}: unknown key; legal here: {', '.join(_legal_keys(root, place[:-1]))}"
        elif item["type"] == "missing":
            yield f"{where}: missing"
        else:
            reason = item["msg"].removeprefix("Value error, ")
            # Of a whole mapping that contradicts itself, the reason names the keys.
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r:.80})"
            yield f"{where}: {reason}{got}" if where else f"{reason}{got}"


def _legal_keys(root: type[Strict], location: tuple[int | str, ...]) -> list[str]:
    owner = root
    for part in location:
        if isinstance(part, str) and part in owner.model_fields:
            owner = next(_models_in(owner.model_fields[part].annotation), owner)
    return sorted(owner.model_fields)


def _models_in(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
