"""The tables of ``bitmill plan``: names are whole at any width, and what is piped is not wrapped."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from jobs.cli.plan import _render, console_for
from pipeline.graph.dag import Kind
from pipeline.graph.forecast import StageRow
from pipeline.graph.plan import MatrixRow, PlanReport, VariantReport
from pipeline.graph.prediction import Stage

NAME = "model.language_model.layers.17.self_attn.a_rather_long_projection_name"
NOTE = "group size 128 does not divide 576: 64 is taken for the whole checkpoint instead"


STAGE = Stage(
    Kind.CALIBRATE,
    12_345,
    98_765.4,
    0.0,
    9_876.5,
    {"weights": 16.1e9, "store, read": 1e9, "store, written": 1e9, "within a node": 1e9, "between nodes": 1e9},
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def report() -> PlanReport:
    row = MatrixRow(NAME, 17, 14336, 4096, 4, 128, "", 117_000_000, 30_300_000)
    rows = (row, replace(row, name=NAME + "_2", note=NOTE))
    variant = VariantReport(
        "gptq-w4-g128",
        "an-organisation/a-model-gptq-w4-g128",
        "gptq",
        4_070_000_000,
        2,
        2,
        1e15,
        2e15,
        {NOTE: 1},
        (),
        (),
        {"8 GB GPU or laptop": True},
        rows,
    )
    return PlanReport(
        source="an-organisation/a-model-with-a-long-name",
        commit="0" * 40,
        architecture="SomethingForConditionalGeneration",
        num_parameters=8_030_000_000,
        num_blocks=32,
        size_bytes=16_100_000_000,
        calibration_tokens=65_536,
        heldout_tokens=8192,
        calibrate_flops=1.5e15,
        kv_cache_tokens=8192,
        kv_cache_bytes=1_070_000_000,
        worker_bytes=6_000_000_000,
        held_bytes=1e9,
        work_bytes=60_000_000_000,
        workers=2,
        hardware="one thread",
        seconds=9000.0,
        bottleneck="solves",
        stages=(StageRow(STAGE, 6_000_000_000, 1.5),),
        price=12.0,
        variants=(variant,),
    )


def rendered(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    _render(report(), console_for(stream), matrices=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_piped_lines_are_as_long_as_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = rendered(io.StringIO(), monkeypatch, 80).splitlines()
    assert any(
        line.startswith("  calibration 65,536 tokens") and line.endswith("for all variants together") for line in lines
    )
    rows = [line for line in lines if line.startswith("17 ")]
    assert [line.split()[1] for line in rows] == [NAME, NAME + "_2"]
    assert rows[1].rstrip().endswith(NOTE)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_terminal_folds_names_and_never_cuts_them(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    said = rendered(Terminal(), monkeypatch, columns)
    assert "…" not in said
    table = said[said.index("block  linear") :].splitlines()
    assert max(map(len, table)) <= columns
    # The name's column, read downwards.
    start, end = table[0].index("linear"), table[0].index("shape")
    column = "".join(line[start:end].strip() for line in table[1:])
    assert column.startswith(NAME + NAME + "_2")


def test_the_console_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "97")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(console_for(Terminal()), Console)
    assert console_for(Terminal()).width == 97
