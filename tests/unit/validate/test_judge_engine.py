"""An engine's tokens and logits against the reference: what is let pass, and what never is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.facts import Check
from pipeline.validate.agreement import NEAR_TIE
from pipeline.validate.engines.environment import judge_engine

VOCABULARY = 16
PROMPT = [3, 1, 4]


def reference(ids: Sequence[int]) -> Tensor:
    """Return logits of which each row depends on the token before: [length, vocabulary]."""
    return torch.stack([torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(index)) for index in ids])


def continued(choose: Callable[[Tensor], int], length: int = 5) -> list[int]:
    """Return the prompt and the tokens that ``choose`` takes from the reference's rows."""
    sequence = list(PROMPT)
    for _ in range(length):
        sequence.append(choose(reference(sequence)[-1]))
    return sequence


def best(row: Tensor) -> int:
    return int(row.argmax())


def judged(
    sequence: list[int],
    logits: Tensor,
    ours: Callable[[Sequence[int]], Tensor] = reference,
    known: tuple[str, ...] = (),
) -> Check:
    result: dict[str, Any] = {
        "versions": {"engine": "1.0"},
        "sequences": [sequence],
        "tokens_per_s": 2.0,
        "dtype": "torch.float32",
    }
    return judge_engine("engine", result, {"0": logits}, ours, [("text", PROMPT)], known)


def test_an_engine_that_computes_the_same_passes() -> None:
    sequence = continued(best)
    check = judged(sequence, reference(sequence) * 1.01)
    assert check.passed
    assert check.figures["tokens_agreeing"] == check.figures["tokens_total"] == 5
    assert check.figures["max_relative_logit_error"] == pytest.approx(0.01, rel=1e-3)


def test_a_near_tie_is_accepted_and_counted() -> None:
    tied = reference([7])
    tied[0, 2], tied[0, 9] = 3.0, 3.0 - 0.9 * NEAR_TIE * float(tied.std())
    sequence, ours = [*PROMPT, 9], lambda ids: tied.expand(len(ids), -1)
    check = judged(sequence, ours(sequence), ours)
    assert check.passed
    assert (check.figures["tokens_agreeing"], check.figures["tokens_total"]) == (0, 1)
    assert 0 < check.figures["worst_gap"] <= NEAR_TIE


def test_another_token_is_refused() -> None:
    sequence = continued(lambda row: int(row.argsort(descending=True)[3]))
    check = judged(sequence, reference(sequence))
    assert not check.passed
    assert check.figures["worst_gap"] > NEAR_TIE


def test_other_logits_are_refused_even_where_the_tokens_agree() -> None:
    sequence = continued(best)
    check = judged(sequence, reference(sequence) * 1.2)
    assert not check.passed
    assert check.figures["tokens_agreeing"] == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["everywhere", "one"])
@pytest.mark.parametrize("whose", ["the engine's", "the reference's"])
def test_logits_that_are_not_finite_are_refused(value: float, place: str, whose: str) -> None:
    sequence = continued(best)
    damaged = reference(sequence)
    if place == "everywhere":
        damaged[:] = value
    else:
        damaged[1, 5] = value
    theirs, ours = (damaged, reference) if whose == "the engine's" else (reference(sequence), lambda ids: damaged)
    check = judged(sequence, theirs, ours)
    assert not check.passed
    assert f"{whose} logits of prompt 0 are not all finite" in check.detail
    json.dumps(check.model_dump(), allow_nan=False)


@pytest.mark.parametrize("shape", [(8, VOCABULARY + 8), (7, VOCABULARY), (1, 8, VOCABULARY)])
def test_logits_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    sequence = continued(best)
    check = judged(sequence, torch.zeros(shape))
    assert not check.passed
    assert f"{list(shape)}, not [8, {VOCABULARY}]" in check.detail


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    def ours(ids: Sequence[int]) -> Tensor:
        assert max(ids) < VOCABULARY, "an embedding has no such row"
        return reference(ids)

    sequence = [*PROMPT, VOCABULARY + 1]
    check = judged(sequence, torch.zeros(4, VOCABULARY + 8), ours)
    assert not check.passed
    assert f"[4, {VOCABULARY + 8}], not [4, {VOCABULARY}]" in check.detail


def test_a_row_without_any_spread_is_refused() -> None:
    sequence, ours = [*PROMPT, 0], lambda ids: torch.ones(len(ids), VOCABULARY)
    check = judged(sequence, ours(sequence), ours)
    assert not check.passed
    json.dumps(check.model_dump(), allow_nan=False)


def test_nothing_generated_is_refused() -> None:
    assert not judged(PROMPT, reference(PROMPT)).passed


def test_what_is_known_of_the_loader_explains_a_failure_only() -> None:
    sequence = continued(best)
    known = ("This loader cannot read it.",)
    assert "cannot read it" not in judged(sequence, reference(sequence), known=known).detail
    assert "This loader cannot read it." in judged(sequence, reference(sequence) * math.nan, known=known).detail
    assert "This loader cannot read it." in judged(sequence, reference(sequence) * 2, known=known).detail
