"""Quantities as people read them. Bytes are decimal: 1 GB = 10^9. Memory sizes of devices are binary: 1 GiB = 2^30."""

from __future__ import annotations

import re

from pipeline.errors import SpecError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return the bytes that for example ``"1.5GB"``, ``"800 MB"`` or ``"2GiB"`` mean.

    Raises:
        SpecError: when it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"{text!r} is no size", code="spec.size", hint="for example 1.5GB, 800MB or 2GiB")
    prefix = match[2].lower()
    step = 1024 if prefix.endswith("i") else 1000
    return round(float(match[1]) * float(step ** " kmgt".index(prefix[:1] or " ")))


def format_bytes(num_bytes: float) -> str:
    """Return for example ``"4.07 GB"``: decimal units, three significant digits."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def format_count(count: float) -> str:
    """Return for example ``"135 M"``: three significant digits with a decimal prefix."""
    value = float(count)
    for unit in ("", " k", " M", " B"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g} T"


def format_duration(seconds: float) -> str:
    """Return for example ``"42 s"``, ``"3 min 05 s"`` or ``"2 h 10 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
