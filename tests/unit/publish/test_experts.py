"""What reports say of experts, and that they say nothing of them where there are none."""

from __future__ import annotations

import io
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipeline.facts import ReleaseFacts
from pipeline.publish.card import render_card
from pipeline.publish.figures import describe_experts, expert_layers
from pipeline.publish.report import render_modules, render_summary
from pipeline.publish.reproduce import reproduce_spec
from tests.factories import make_facts, make_module

TOKENS = {0: (120, 0, 64, 3000), 1: (9, 10, 11, 14)}
"""Of two blocks, the tokens of each expert."""


def mixture(**calibration: Any) -> ReleaseFacts:
    facts = make_facts()
    modules = tuple(
        make_module(f"model.layers.{block}.mlp.experts.{number}.{part}", block=block, expert_tokens=count)
        for block, counts in TOKENS.items()
        for number, count in enumerate(counts)
        for part in ("gate_proj", "up_proj", "down_proj")
    )
    told = {"experts": "all", **calibration}
    return facts.model_copy(
        update={
            "modules": (make_module(), *modules),
            "calibration": type(facts.calibration).model_validate(facts.calibration.model_dump() | told),
        }
    )


def printed(render: Any, facts: ReleaseFacts) -> str:
    stream = io.StringIO()
    render(facts, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_card_has_a_row_for_the_experts_of_each_block() -> None:
    card = render_card(mixture())
    assert "### Experts" in card
    assert "| `model.layers.0.mlp.experts` | 4 | 0 | 92 | 3000 | 1 |" in card
    assert "| `model.layers.1.mlp.experts` | 4 | 9 | 10 | 14 | 0 |" in card
    assert (
        "statistics of all tokens; the router sent 0 to 3000 calibration tokens to an expert, and none to 1 of 8"
        in card
    )


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ({"experts": "routed"}, "statistics of the tokens that the router sent to each;"),
        (
            {"experts": "shrinkage", "expert_shrinkage": 0.25},
            "statistics of the tokens sent to each, drawn towards all with weight 0.25;",
        ),
    ],
)
def test_which_tokens_the_statistics_are_of_is_said(calibration: dict[str, Any], expected: str) -> None:
    facts = mixture(**calibration)
    assert expected in describe_experts(facts, expert_layers(facts))
    assert expected in printed(render_summary, facts)


def test_rows_of_linears_have_the_tokens_of_their_expert() -> None:
    lines = printed(render_modules, mixture()).splitlines()
    assert "tokens" in lines[0]
    cells = {line.split()[0]: line.split() for line in lines if line.startswith("model.")}
    assert cells["model.layers.0.mlp.experts.3.down_proj"][6] == "3000"
    assert cells["model.layers.0.self_attn.q_proj"][6] == "-"


def test_models_without_experts_have_no_word_of_them() -> None:
    facts = make_facts()
    assert "Experts" not in render_card(facts)
    assert "experts" not in printed(render_summary, facts)
    assert "tokens" not in printed(render_modules, facts).splitlines()[0]


def test_how_experts_were_calibrated_is_reproduced() -> None:
    assert reproduce_spec(mixture()) is None
    told = {"experts": "shrinkage", "expert_shrinkage": 0.25, "min_expert_tokens": 128}
    text = reproduce_spec(mixture(**told))
    assert text is not None
    assert yaml.safe_load(text)["calibration"] == {"experts": "shrinkage", "expert_shrinkage": 0.25}
