"""Quantities as people read them."""

from __future__ import annotations

import pytest

from pipeline.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4_070_000_000, "4.07 GB"), (999_600, "1 MB"), (2.5e15, "2500 TB")],
)
def test_bytes_have_decimal_units(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (134_515_008, "135 M"), (4.05e11, "405 B"), (1.5e12, "1.5 T")])
def test_counts_have_decimal_prefixes(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_have_the_units_that_matter(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
