"""Identity from content: what is the same, what is not, and what cannot have one."""

from __future__ import annotations

import hashlib
import math
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.fingerprint import DIGEST_CHUNK_BYTES, canonical_json, digest_bytes, digest_file, fingerprint
from pipeline.spec import parse_variant

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


class Colour(StrEnum):
    RED = "red"


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


def test_values_that_are_written_alike_are_one() -> None:
    assert canonical_json({"b": (1, 2), "a": Colour.RED}) == '{"a":"red","b":[1,2]}'
    assert fingerprint(parse_variant("gptq-w4-g64")) == fingerprint(parse_variant("gptq-w4-g64").model_dump())


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": None}, {}])
def test_other_values_have_other_fingerprints(other: dict[str, Any]) -> None:
    assert fingerprint(other) != fingerprint({"a": 1})


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, Path("x"), {1: 2}, b"bytes", {1, 2}, object()], ids=lambda value: type(value).__name__
)
def test_what_has_no_canonical_form_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"\$\.outer\[0\]"):
        fingerprint({"outer": [value]})


@pytest.mark.parametrize("size", [0, 1, DIGEST_CHUNK_BYTES, DIGEST_CHUNK_BYTES + 1])
def test_a_file_has_the_digest_of_its_bytes(size: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest_bytes(data) == hashlib.sha256(data).hexdigest()
