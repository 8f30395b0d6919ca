"""Quantities as people read them. Bytes are decimal: 1 GB = 10^9. Memory sizes of devices are binary: 1 GiB = 2^30."""

from __future__ import annotations


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
