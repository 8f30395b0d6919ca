"""Texts to tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.calibrate.tokens import Text, coverage_cautions, load_text, take_tokens
from pipeline.errors import CalibrationError
from pipeline.settings import Settings

SETTINGS = Settings("http://127.0.0.1:9", None, Path("unused"), None, None)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_plain_text_gives_its_first_tokens_in_order() -> None:
    batch = take_tokens(Text("abcdefgh", "t"), letters, samples=2, length=3)
    assert batch.tokens_NL.tolist() == [letters("abc"), letters("def")]
    later = take_tokens(Text("abcdefgh", "t"), letters, samples=1, length=2, skip=6)
    assert later.tokens_NL.tolist() == [letters("gh")]
    assert later.digest != batch.digest


def test_a_short_text_says_what_it_has_and_what_would_fit() -> None:
    with pytest.raises(CalibrationError, match="t has 8 tokens, but 3 x 3 are needed") as caught:
        take_tokens(Text("abcdefgh", "t"), letters, samples=3, length=3)
    assert "--samples 2" in caught.value.hint


def test_documents_are_drawn_in_the_seed_s_order(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(9)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "d.parquet")
    first = load_text(str(tmp_path / "d.jsonl"), "calibration", 0, SETTINGS)
    assert sorted(first.content.split("\n\n")) == documents
    assert first.content != load_text(str(tmp_path / "d.jsonl"), "calibration", 1, SETTINGS).content
    assert first.content == load_text(str(tmp_path / "d.parquet"), "calibration", 0, SETTINGS).content


def test_a_missing_text_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"body": "x"}')
    with pytest.raises(CalibrationError, match=r"d\.jsonl has no readable `text` column: line 1"):
        load_text(str(tmp_path / "d.jsonl"), "calibration", 0, SETTINGS)
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(CalibrationError, match=r"d\.parquet has no readable `text` column"):
        load_text(str(tmp_path / "d.parquet"), "calibration", 0, SETTINGS)


def test_shipped_texts_differ() -> None:
    calibration = load_text("builtin", "calibration", 0, SETTINGS)
    heldout = load_text("builtin", "heldout", 0, SETTINGS)
    assert len(calibration.content) > 500_000
    assert len(heldout.content) > 200_000
    assert calibration.content[:2000] not in heldout.content


def test_a_linear_wider_than_the_calibration_has_tokens_is_a_caution() -> None:
    (caution,) = coverage_cautions(1024, [512, 1024, 2048, 4096, 4096])
    assert "1,024 calibration tokens" in caution
    assert "3 linears, up to 4,096 wide" in caution
    assert coverage_cautions(4096, [512, 4096]) == ()
