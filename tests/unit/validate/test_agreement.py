"""Tokens that somebody else chose against the reference's logits."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.validate.agreement import NEAR_TIE, Agreement, compare_choice, compare_choices
from pipeline.validate.engines.environment import judge_engine

VOCABULARY = 50


def logits(length: int) -> torch.Tensor:
    return torch.randn(length, VOCABULARY, generator=torch.Generator().manual_seed(length))


def test_own_choices_agree_and_every_position_is_judged_by_the_one_before() -> None:
    reference = logits(6)
    own = reference.argmax(-1).tolist()
    ids = [3, 1, *own[1:5]]
    assert compare_choices(reference, ids, 2) == Agreement(4, 4, 0.0)
    ids[4] = (ids[4] + 1) % VOCABULARY
    found = compare_choices(reference, ids, 2)
    row = reference[3]
    assert (found.total, found.agreeing) == (4, 3)
    assert found.worst_gap == pytest.approx(float((row.max() - row[ids[4]]) / row.std()))


@pytest.mark.parametrize(("lead", "is_near"), [(0.0, True), (0.95 * NEAR_TIE, True), (1.05 * NEAR_TIE, False)])
def test_near_ties_are_allowed_in_units_of_the_spread(lead: float, is_near: bool) -> None:
    row = torch.zeros(VOCABULARY)
    row[:2] = torch.tensor([5.0, 5.0])
    spread = float(row.std())
    for scale in (1.0, 100.0):
        other = row.clone()
        other[1] -= lead * spread
        assert compare_choice(other * scale, [1]).is_near is is_near


def test_one_of_several_choices_is_enough() -> None:
    row = logits(1)[0]
    best = int(row.argmax())
    assert compare_choice(row, {int(row.argmin()), best}) == Agreement(1, 1, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_agree_with_nothing(bad: float) -> None:
    row = logits(1)[0]
    row[7] = bad
    for choice in (7, 8):
        assert compare_choice(row, [choice]).worst_gap == math.inf
    assert not compare_choice(torch.full((VOCABULARY,), 2.0), [1]).is_near, "equal logits choose nothing"


@pytest.mark.parametrize("choices", [[], [VOCABULARY], [-1]])
def test_choices_outside_the_vocabulary_do_not_agree(choices: list[int]) -> None:
    assert not compare_choice(logits(1)[0], choices).is_near


def test_nothing_judged_is_no_agreement() -> None:
    assert not Agreement().is_near
    assert (Agreement(2, 1, 0.1) + Agreement(3, 3, 0.0)) == Agreement(5, 4, 0.1)


def test_an_engine_s_tokens_are_judged_the_same_way() -> None:
    reference = logits(5)
    sequence = [1, 2, 3, *reference.argmax(-1).tolist()[2:4]]

    def check(sequence: list[int]) -> bool:
        result = {"sequences": [sequence], "versions": {}, "dtype": "float32", "tokens_per_s": 1.0}
        return judge_engine("e", result, {"0": reference}, lambda ids: reference, [("p", [1, 2, 3])]).passed

    assert check(sequence)
    assert not check([*sequence[:4], int(reference[3].argmin())])
    assert not check(sequence[:3])
