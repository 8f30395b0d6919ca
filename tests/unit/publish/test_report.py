"""The report on a terminal, and the facts as JSON."""

from __future__ import annotations

import io
import itertools
import json
import math
import re

import pytest
from rich.console import Console

from pipeline.facts import Check, ReleaseFacts
from pipeline.publish.report import facts_as_json, render_modules, render_summary
from pipeline.spec import parse_variant
from tests.factories import make_facts, make_module, make_verdict


def console(width: int = 120, *, terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
        _environ={},
    )


def summary(facts: ReleaseFacts, width: int = 120) -> str:
    return text_of(render_summary, facts, console(width))


def modules(facts: ReleaseFacts, width: int = 120) -> str:
    return text_of(render_modules, facts, console(width))


def text_of(render: object, facts: ReleaseFacts, target: Console) -> str:
    assert callable(render)
    render(facts, target)
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_the_summary_says_what_it_is_and_how_it_was_judged() -> None:
    text = summary(make_facts())
    for expected in (
        "demo/TinyLlama-gptq-w4-g128  PASSED",
        "acme/TinyLlama (hub, 0123456789ab), LlamaForCausalLM, 168 M parameters",
        "336 MB -> 136 MB, 2.47 times smaller, 6.47 bits per parameter",
        "perplexity 23.94 (source 22.61), KL 0.0612, top-1 agreement 87.31 %",
        "gptq-w4-g128 (this one)",
    ):
        assert expected in text
    rows = [line.split() for line in text.splitlines()]
    assert ["largest", "relative", "error", "of", "a", "module", "0.1851", "0.35", "ok"] in rows
    assert "Degradations" not in text
    assert "Failed checks" not in text


def test_the_summary_names_what_failed_and_what_was_done_otherwise() -> None:
    note = "128 does not divide 576"
    facts = make_facts(
        modules=(
            make_module("m.0.q", relative_error=0.5, degradations=("damping 0.04",)),
            make_module("m.0.down_proj", group_size=64, note=note),
            make_module("m.1.down_proj", group_size=64, note=note),
        ),
        dropped={"m.0.inv_freq": "recomputed"},
    )
    checks = (Check(name="relative_error", passed=False, detail="m.0.q 0.5 > 0.35"),)
    text = summary(facts.model_copy(update={"verdict": make_verdict(facts.variant, checks=checks)}), 60)
    for expected in (
        "FAILED",
        "Failed checks\n  relative_error: m.0.q 0.5 > 0.35",
        "Degradations\n  m.0.q: damping 0.04",
        f"Other than the scheme\n  m.*.down_proj (x2): 4 bit, groups of 64: {note}",
        "Dropped from the source\n  m.0.inv_freq: recomputed",
        "EXCEEDED",
    ):
        assert expected in text


def test_the_summary_admits_seen_text_and_marks_what_was_not_published() -> None:
    facts = make_facts()
    assert "calibration has seen" not in summary(facts)
    assert "not published" not in summary(facts)
    facts = facts.model_copy(
        update={
            "quality": facts.quality.model_copy(update={"heldout_overlap": 0.1234}),
            "siblings": (facts.siblings[0].model_copy(update={"passed": False}), *facts.siblings[1:]),
        }
    )
    assert "calibration has seen 12.34 % of it" in summary(facts, 200)
    assert "awq-w4-g128 (not published)" in summary(facts)
    assert summary(facts).count("not published") == 1


def test_long_lists_end_with_how_many_more_there_are() -> None:
    facts = make_facts(modules=tuple(make_module(f"m.{i}.q", degradations=(f"damping {i}",)) for i in range(25)))
    assert summary(facts).count(": damping ") == 20
    assert "  and 5 more" in summary(facts)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_tables_keep_to_the_width_and_lose_no_name(width: int) -> None:
    facts = make_facts(num_blocks=2)
    text = modules(facts, width)
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(line[: line.find("  ")] if "  " in line else line for line in text.splitlines())
    assert all(module.name in joined for module in facts.modules) or width < 60


def test_narrow_consoles_show_fewer_figures() -> None:
    facts = make_facts(num_blocks=1)
    titles = [modules(facts, width).splitlines()[0].split() for width in (60, 80, 100, 120, 160)]
    assert [len(row) for row in titles] == sorted(len(row) for row in titles)
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(titles))
    assert titles[0][-2:] == ["rel.", "error"]
    assert "damping" not in titles[1]
    assert "damping" in titles[3]
    assert titles[4][-1] == "exponent"


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_names_are_whole_where_there_is_room_for_any_figure(width: int) -> None:
    facts = make_facts(num_blocks=1)
    lines = modules(facts, width).splitlines()
    assert all(any(line.startswith(f"{module.name} ") for line in lines) for module in facts.modules)


def test_rows_hold_the_figures_of_their_linear() -> None:
    facts = make_facts(
        modules=(
            make_module("m.0.q", awq_exponent=0.45, note="why", degradations=("damping 0.04",)),
            make_module("m.0.k", bits=16, group_size=0),
            make_module("m.0.v", group_size=-1, damping=0.0, dead_inputs=3),
        )
    )
    text = modules(facts)
    rows = [line.split() for line in text.splitlines()[2:5]]
    assert [" ".join(row) for row in rows] == [
        "m.0.q 1024 x 1024 4 128 8.00 % 9.00 % 0.0123 0.01 0.150 0.940 0.45",
        "m.0.k 1024 x 1024 - - - - - - - - -",
        "m.0.v 1024 x 1024 4 row 8.00 % 9.00 % 0.0123 - 0.150 0.940 -",
    ]
    assert text.endswith(
        "Notes\n  m.0.q: why\n  m.0.q: damping 0.04\n  m.0.v: 3 of 1024 inputs were zero on all tokens\n"
    )


def test_rounds_are_shown_of_variants_that_were_refined() -> None:
    variant = parse_variant("gptq-w4-g128").model_copy(update={"refinement": 5})
    facts = make_facts(variant=variant, modules=(make_module("m.0.q", refinement_rounds=3),))
    header, *_, row = (line.split() for line in modules(facts).splitlines())
    assert (header[-1], row[-1]) == ("rounds", "3")
    assert "GPTQ and refinement" in text_of(render_summary, facts, console())


def test_colours_are_for_terminals_only() -> None:
    facts = make_facts(modules=(make_module(relative_error=0.5),))
    assert "\x1b[" not in text_of(render_modules, facts, console())
    assert re.search(r"\x1b\[1;31m *50\.00 %", text_of(render_modules, facts, console(terminal=True)))


def test_names_can_neither_format_nor_steer_the_terminal() -> None:
    facts = make_facts(modules=(make_module("[red]m\x1b[2J", note="[bold]n\x07"),))
    for text in (modules(facts), summary(facts)):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[red]m" in text
        assert "[bold]n" in text


def test_the_json_reads_back_as_the_same_facts() -> None:
    facts = make_facts()
    assert ReleaseFacts.model_validate_json(facts_as_json(facts)) == facts


def test_the_json_is_strict_and_the_same_whatever_the_order_of_mappings() -> None:
    facts = make_facts()
    broken = facts.model_copy(
        update={
            "kept": dict(reversed(facts.kept.items())),
            "quality": facts.quality.model_copy(update={"kl": math.inf, "perplexity": math.nan}),
        }
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(facts_as_json(broken), parse_constant=refuse)
    assert (data["quality"]["kl"], data["quality"]["perplexity"]) == ("Infinity", "NaN")
    assert ReleaseFacts.model_validate_json(facts_as_json(broken)).quality.kl == math.inf
    assert facts_as_json(facts.model_copy(update={"kept": broken.kept})) == facts_as_json(facts)
    assert list(data) == list(ReleaseFacts.model_fields)
