"""Gates and the figures that they judge."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.facts import Quality
from pipeline.spec import Budgets, PromptSpec
from pipeline.validate import divergence
from pipeline.validate.gates import check_accounting, check_divergence, check_round_trip
from pipeline.validate.generation import Continuation, degeneracy, judge_continuation

GOOD = Continuation(tuple(range(20)), "words that go on")
STUCK = Continuation((7,) * 20, "!!!!!!!!!!!!!!!!!!!!")


def test_a_lost_tensor_fails_accounting() -> None:
    assert check_accounting(["a", "b", "c"], ["a"], {"b": "norm"}, {"c": "unused"}).passed
    lost = check_accounting(["a", "b", "c"], ["a"], {"b": "norm"}, {})
    assert not lost.passed
    assert "unaccounted: c" in lost.detail
    assert not check_accounting(["a"], ["a"], {"a": "norm"}, {}).passed


def test_every_linear_must_be_proven() -> None:
    assert check_round_trip(4, 4, []).passed
    assert not check_round_trip(3, 4, []).passed


def test_a_copy_that_differs_fails_the_round_trip() -> None:
    problems = [f"tensor {number} was not copied bit for bit" for number in range(5)]
    failed = check_round_trip(4, 4, problems)
    assert not failed.passed
    assert "tensor 2 was not copied" in failed.detail
    assert "tensor 3" not in failed.detail
    assert failed.detail.endswith("and 2 more")


@pytest.mark.parametrize(
    ("kl", "perplexity", "passed"),
    [(0.1, 11.0, True), (0.3, 11.0, False), (0.1, 16.0, False), (math.nan, 11.0, False), (0.1, math.inf, False)],
)
def test_divergence_is_judged_by_its_budgets(kl: float, perplexity: float, passed: bool) -> None:
    budgets = Budgets(max_relative_error=None, max_kl=0.2, max_perplexity_ratio=1.5, max_degradations=0)
    quality = Quality(
        heldout_text="t", heldout_tokens=10, source_perplexity=10.0, perplexity=perplexity, kl=kl, top1_agreement=0.9
    )
    assert check_divergence(quality, budgets).passed is passed


def test_degenerate_text_is_found() -> None:
    assert degeneracy(()) == "nothing was generated"
    assert "in a row" in degeneracy(STUCK.ids)
    assert "distinct" in degeneracy((1, 2) * 10)
    assert degeneracy(GOOD.ids) == ""


def test_a_variant_is_not_blamed_for_what_its_source_does() -> None:
    prompt = PromptSpec(prompt="Hi")
    assert judge_continuation(prompt, GOOD, STUCK) != ""
    assert judge_continuation(prompt, STUCK, STUCK) == ""
    assert judge_continuation(PromptSpec(prompt="Hi", expect="go on$"), GOOD, GOOD) == ""
    assert "does not match" in judge_continuation(PromptSpec(prompt="Hi", expect="^no"), GOOD, GOOD)


def test_divergence_equals_its_definition_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    source, variant = torch.randn(2, 9, 11, generator=generator).unbind()
    tokens = torch.randint(11, (9,), generator=generator)
    whole = divergence.compare_logits(source, variant, tokens)
    p, q = source.double().log_softmax(-1)[:-1], variant.double().log_softmax(-1)[:-1]
    assert whole.num_tokens == 8
    assert whole.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum() / 8), rel=1e-5)
    assert whole.source_nll == pytest.approx(-float(p.gather(1, tokens[1:, None]).sum()), rel=1e-5)
    assert whole.perplexity == pytest.approx(math.exp(-float(q.gather(1, tokens[1:, None]).mean())), rel=1e-5)
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 33)
    parts = divergence.compare_logits(source, variant, tokens)
    assert parts.as_dict() == pytest.approx(whole.as_dict(), rel=1e-5)
