"""Texts to tokens."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n{"body": "x", "id": 3}\n', "line 2 has only `body`, `id`"),
        ('{"text": "a"}\n\n{}\n', "line 3 has nothing"),
        ('["text"]', "line 1 is not a JSON object"),
        ('{"text": ', "line 1 is not JSON: Expecting value"),
        (json.dumps({f"c{i}": 0 for i in range(10)}), "line 1 has only `c0`.*`c7` and 2 more"),
    ],
)
def test_a_jsonl_file_without_text_is_refused_in_plain_words(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(CalibrationError) as caught:
        load_text(str(tmp_path / "d.jsonl"), "calibration", 0, SETTINGS)
    assert re.fullmatch(rf"d\.jsonl has no readable `text` column: {reason}", caught.value.message)


def test_a_parquet_file_without_text_is_refused_with_its_columns_and_not_with_its_schema(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [3]}), tmp_path / "d.parquet")
    with pytest.raises(CalibrationError) as caught:
        load_text(str(tmp_path / "d.parquet"), "calibration", 0, SETTINGS)
    assert caught.value.message == "d.parquet has no readable `text` column: it has only `body`, `id`"
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(CalibrationError, match=r"broken\.parquet .* it cannot be read as Parquet: ") as caught:
        load_text(str(tmp_path / "broken.parquet"), "calibration", 0, SETTINGS)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("separator", ["\n", "\r\n"])
def test_a_document_ends_at_a_line_feed_and_not_at_other_separators_inside_its_text(
    tmp_path: Path, separator: str
) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    lines = [json.dumps({"text": text}, ensure_ascii=False), "", '{"text": "last"}']
    (tmp_path / "d.jsonl").write_bytes(separator.join([*lines, ""]).encode())
    found = load_text(str(tmp_path / "d.jsonl"), "calibration", 0, SETTINGS)
    assert sorted(found.content.split("\n\n")) == ["last", text]


@pytest.mark.parametrize("value", ["null", "3", '["a"]', "true"])
def test_a_text_that_is_no_string_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n\n{"text": ' + value + "}\n")
    with pytest.raises(CalibrationError, match=r"d\.jsonl has no readable `text` column: line 3"):
        load_text(str(tmp_path / "d.jsonl"), "calibration", 0, SETTINGS)


@pytest.mark.parametrize("line", ['"text"', "[1]", "3", "null"])
def test_a_line_that_is_no_object_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(CalibrationError, match=r"d\.jsonl has no readable `text` column: line 1"):
        load_text(str(tmp_path / "d.jsonl"), "calibration", 0, SETTINGS)


def test_a_parquet_column_that_holds_no_text_is_refused_and_its_nulls_are_no_documents(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [3, 4]}), tmp_path / "d.parquet")
    with pytest.raises(CalibrationError, match=r"d\.parquet has no readable `text` column: it holds int64"):
        load_text(str(tmp_path / "d.parquet"), "calibration", 0, SETTINGS)
    parquet.write_table(pyarrow.table({"text": ["a", None, ""]}), tmp_path / "d.parquet")
    assert load_text(str(tmp_path / "d.parquet"), "calibration", 0, SETTINGS).content == "a"


@pytest.mark.parametrize("text", ["~nosuchuser123/x.txt", "a" * 5000])
def test_a_path_that_leads_nowhere_is_said(text: str) -> None:
    with pytest.raises(CalibrationError, match="cannot be read") as caught:
        load_text(text, "calibration", 0, SETTINGS)
    assert len(caught.value.message) < 600


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
