"""Gates and the figures that they judge."""

from __future__ import annotations

import math
from importlib import resources

import pytest
import torch

from pipeline.calibrate.tokens import BUILTIN_FILES
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.spec import Budgets, PromptSpec
from pipeline.validate import divergence
from pipeline.validate.gates import check_accounting, check_divergence, check_round_trip
from pipeline.validate.generation import Continuation, Fault, degeneracy, judge_continuation
from tests.architectures import TOKENIZER_FOLDER
from tests.factories import make_facts

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
    quality = make_facts().quality.model_copy(update={"source_perplexity": 10.0, "perplexity": perplexity, "kl": kl})
    assert check_divergence(quality, budgets).passed is passed


EVERY_FAULT = {
    Fault.EMPTY: Continuation((), ""),
    Fault.RUN: STUCK,
    Fault.LOOP: Continuation((1, 2, 3, 4, 5) * 6 + (1, 2), "and so on and so on"),
    Fault.POOR: Continuation((1, 1, 2, 2, 1, 2, 1, 1, 1, 2, 2, 1, 2, 2, 2, 1), "no no yes"),
}


def test_degenerate_text_is_found() -> None:
    for kind, text in EVERY_FAULT.items():
        found = degeneracy(text.ids)
        assert found is not None
        assert found.kind is kind
    assert degeneracy(GOOD.ids) is None


@pytest.mark.parametrize("own", [GOOD, *EVERY_FAULT.values()])
@pytest.mark.parametrize("source", [GOOD, *EVERY_FAULT.values()])
def test_a_variant_is_not_blamed_for_what_its_source_does_and_for_all_else(
    source: Continuation, own: Continuation
) -> None:
    found = judge_continuation(PromptSpec(prompt="Hi"), source, own)
    if own is GOOD:
        assert (found.fault, found.excused) == ("", "")
    else:
        assert bool(found.excused) is (source is own)
        assert bool(found.fault) is (source is not own)


def test_a_continuation_is_searched_for_what_is_expected_even_where_degenerate_text_is_excused() -> None:
    assert judge_continuation(PromptSpec(prompt="Hi", expect="go on$"), GOOD, GOOD).fault == ""
    for text in (GOOD, STUCK):
        found = judge_continuation(PromptSpec(prompt="Hi", expect="^no"), text, text)
        assert "does not match" in found.fault


@pytest.mark.parametrize("length", [8, 16, 32])
def test_real_text_is_not_degenerate(length: int) -> None:
    ids = TextTokenizer(TOKENIZER_FOLDER).encode(
        (resources.files("pipeline.calibrate") / "data" / BUILTIN_FILES["heldout"]).read_text(encoding="utf-8")
    )
    found = [start for start in range(len(ids) - length) if degeneracy(ids[start : start + length])]
    assert found == []


@pytest.mark.parametrize("text", [
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16",
    "the first of the first, the second of the second, and the third of the third, until the last of the last was done",
    "He said that he would go. She said that she would go. They said that they would go. Then we said that we would",
    "row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily, life is but a dream",
    "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n| 4 | 5 | 6 |\n| 7 | 8 | 9 |\n",
])  # fmt: skip
def test_text_that_repeats_with_a_purpose_is_not_degenerate(text: str) -> None:
    ids = TextTokenizer(TOKENIZER_FOLDER).encode(text)
    assert len(ids) > 16
    for length in range(8, len(ids) + 1):
        assert degeneracy(ids[:length]) is None, length


def test_divergence_equals_its_definition_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    source, variant = torch.randn(2, 9, 11, generator=generator).unbind()
    tokens = torch.randint(11, (9,), generator=generator)
    whole = divergence.compare_predictions(torch.clone, source, variant, tokens, 11)
    p, q = source.double().log_softmax(-1)[:-1], variant.double().log_softmax(-1)[:-1]
    assert whole.num_tokens == 8
    assert whole.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum() / 8), rel=1e-5)
    assert whole.source_nll == pytest.approx(-float(p.gather(1, tokens[1:, None]).sum()), rel=1e-5)
    assert whole.perplexity == pytest.approx(math.exp(-float(q.gather(1, tokens[1:, None]).mean())), rel=1e-5)
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 33)
    parts = divergence.compare_predictions(torch.clone, source, variant, tokens, 11)
    assert parts.as_dict() == pytest.approx(whole.as_dict(), rel=1e-5)
