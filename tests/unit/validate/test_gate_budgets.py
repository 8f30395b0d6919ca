"""Every gate passes and fails for its own reason, and the verdict is the sum of them."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.facts import Check, Sample
from pipeline.spec import Budgets, PromptSpec
from pipeline.validate import divergence
from pipeline.validate.dense import scale_problems
from pipeline.validate.divergence import Divergence, add_up, compare_predictions
from pipeline.validate.gates import (
    check_accounting,
    check_degradations,
    check_generation,
    check_relative_error,
    check_scales,
    make_verdict,
)
from pipeline.validate.generation import Continuation, degeneracy
from tests.factories import make_module

BUDGETS = Budgets(max_relative_error=None, max_kl=None, max_perplexity_ratio=None, max_degradations=None)
GOOD, STUCK = Continuation((5, 6, 7), "and so on"), Continuation((7,) * 8, "!!!!!!!!")


def test_accounting_counts_and_names_what_is_twice() -> None:
    check = check_accounting(["a", "b", "c", "d"], ["a", "b"], {"c": "norm"}, {"d": "unused"})
    assert check == Check(name="accounting", passed=True, detail="2 quantized, 1 copied, 1 dropped of 4 source tensors")
    twice = check_accounting(["a", "b"], ["a", "b"], {"b": "norm"}, {})
    assert not twice.passed
    assert twice.detail.endswith("both quantized and copied: b")


def test_scales_gate_repeats_the_first_problem() -> None:
    assert check_scales([], 7) == Check(
        name="scales", passed=True, detail="all scales of 7 linears are finite and normal in float16"
    )
    assert check_scales(["x: bad", "y: bad"], 7) == Check(name="scales", passed=False, detail="x: bad")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0, 2.0**-15, 65536.0])
def test_a_scale_that_float16_cannot_hold_is_named_with_its_place(bad: float) -> None:
    scale = torch.full((4, 3), 0.5)
    assert scale_problems("m.q_proj", scale) == []
    scale[2, 1] = bad
    assert scale_problems("m.q_proj", scale) == [
        f"m.q_proj: 1 scales not normal in float16, first {bad!r} at row 2, group 1"
    ]


@pytest.mark.parametrize("edge", [2.0**-14, 65504.0])
def test_the_ends_of_float16_are_within(edge: float) -> None:
    assert scale_problems("m", torch.tensor([[edge]])) == []


@pytest.mark.parametrize(("error", "budget", "passed"), [
    (0.2, 0.2, True), (0.2001, 0.2, False), (math.nan, 0.2, False), (9.0, None, True),
])  # fmt: skip
def test_relative_error_is_judged_module_by_module(error: float, budget: float | None, passed: bool) -> None:
    modules = [make_module("a", relative_error=0.1), make_module("b", relative_error=error)]
    check = check_relative_error(modules, budget)
    assert check.passed is passed
    assert ("1 modules above" in check.detail and "b (" in check.detail) is not passed


def test_unquantized_modules_have_no_error_to_judge() -> None:
    kept = make_module("head", bits=16, group_size=0, relative_error=0.0)
    check = check_relative_error([kept, make_module("a", relative_error=0.1)], 0.2)
    assert check.figures == {"worst": 0.1}


@pytest.mark.parametrize(("budget", "passed"), [(0, False), (1, False), (2, True), (None, True)])
def test_degradations_are_counted_and_named(budget: int | None, passed: bool) -> None:
    modules = [
        make_module("a", degradations=("damping 0.1",)),
        make_module("b"),
        make_module("c", degradations=("rtn",)),
    ]
    check = check_degradations(modules, budget)
    assert check.passed is passed
    assert check.figures == {"count": 2.0}
    assert check.detail == "a: damping 0.1; c: rtn"


def test_no_degradation_is_within_a_budget_of_none() -> None:
    assert check_degradations([make_module("a")], 0) == Check(
        name="degradations", passed=True, detail="none", figures={"count": 0.0}
    )


def test_generation_gate_names_the_prompt_that_failed() -> None:
    prompts = [PromptSpec(prompt="One"), PromptSpec(prompt="Two")]
    passed = check_generation(prompts, [GOOD, GOOD], [GOOD, Continuation((5, 6), "and")])
    assert passed == Check(name="generation", passed=True, detail="2 prompts continued; 1 word for word as the source")
    failed = check_generation(prompts, [GOOD, GOOD], [GOOD, STUCK])
    assert failed == Check(name="generation", passed=False, detail="'Two': one token 8 times in a row")
    excused = check_generation(prompts, [GOOD, STUCK], [GOOD, STUCK])
    assert excused == Check(
        name="generation",
        passed=True,
        detail="2 prompts continued; 2 word for word as the source; 1 excused, as the source does the like: "
        "'Two': one token 8 times in a row",
    )


def test_a_missing_continuation_is_no_pass() -> None:
    with pytest.raises(ValueError, match="zip"):
        check_generation([PromptSpec(prompt="One")], [GOOD], [])


def test_one_failed_check_fails_the_verdict() -> None:
    good, bad = Check(name="a", passed=True, detail=""), Check(name="b", passed=False, detail="no")
    prompts = [PromptSpec(prompt="One", expect="^and")]
    assert make_verdict([good], BUDGETS, prompts, [GOOD]).passed
    verdict = make_verdict([good, bad], BUDGETS, prompts, [GOOD])
    assert not verdict.passed
    assert verdict.failures == (bad,)
    assert verdict.samples == (Sample(prompt="One", expect="^and", continuation="and so on", ids=(5, 6, 7)),)
    assert not make_verdict([], BUDGETS, prompts, [GOOD]).passed


@pytest.mark.parametrize(("ids", "fault"), [
    ((), "nothing was generated"),
    ((7,), ""),
    ((7,) * 7, "only 1 distinct tokens in 7"),
    ((6, *(7,) * 7, 8), ""),
    ((7,) * 8, "one token 8 times in a row"),
    ((1, 2) * 3 + (1,), ""),
    ((1, 2) * 4, "the last 8 tokens repeat 2"),
    ((1, 2, 3) * 3 + (1, 2), ""),
    ((1, 2, 3) * 4, "the last 12 tokens repeat 3"),
    ((1, 2, 3, 4, 5) * 6 + (1, 2), "the last 32 tokens repeat 5"),
    ((90, 91, 92, 93, 94, 95, 96, 97) + (1, 2, 3, 4, 5, 6) * 4, "the last 24 tokens repeat 6"),
    ((90, 91, 92, 93, 94, 95, 96, 97, 98) + (1, 2, 3, 4, 5, 6) * 4, ""),
    ((1, 2, 3, 4, 5, 6) * 5 + (7, 8), ""),
    ((1, 1, 2, 2, 1, 2, 1, 1, 1, 2, 2, 1, 2, 2, 2, 1), "only 2 distinct tokens in 16"),
    (tuple(range(16)) * 4, "the last 64 tokens repeat 16"),
    (tuple(range(17)) * 4, ""),
])  # fmt: skip
def test_degeneracy_starts_where_its_bounds_say(ids: tuple[int, ...], fault: str) -> None:
    found = degeneracy(ids)
    assert (found.text if found else "") == fault


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7])
def test_no_prediction_is_lost_or_scored_twice_at_a_chunk_s_edge(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 3 * 13)
    generator = torch.Generator().manual_seed(length)
    source, variant = (torch.randn(length, 13, generator=generator) * 3 for _ in range(2))
    tokens = torch.randint(13, (length,), generator=generator)
    expected = Divergence(0, 0.0, 0.0, 0.0, 0)
    for position in range(length - 1):
        p, q = source[position].double().log_softmax(-1), variant[position].double().log_softmax(-1)
        target = int(tokens[position + 1])
        kl = float((p.exp() * (p - q)).sum())
        agrees = int(int(p.argmax()) == int(q.argmax()))
        expected = add_up([expected, Divergence(1, -float(p[target]), -float(q[target]), kl, agrees)])
    found = compare_predictions(torch.clone, source, variant, tokens, 13)
    assert found.as_dict() == pytest.approx(expected.as_dict(), rel=1e-5)


def test_equal_logits_do_not_diverge() -> None:
    logits = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    found = compare_predictions(torch.clone, logits, logits.clone(), torch.arange(5), 13)
    assert (found.kl, found.num_agreeing, found.top1_agreement) == (0.0, 4, 1.0)
    assert found.perplexity == found.source_perplexity


def test_a_hopeless_variant_has_infinite_perplexity() -> None:
    assert Divergence(1, 1.0, 800.0, 799.0, 0).perplexity == math.inf
