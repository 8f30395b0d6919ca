"""Bits under a budget: the best choice there is, to the byte."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import QuantizationError
from pipeline.quantize import allocate as module
from pipeline.quantize.allocate import Choice, allocate

CHOICES = st.lists(
    st.builds(Choice, st.integers(2, 8), st.integers(1, 60), st.floats(0, 10)),
    min_size=1,
    max_size=4,
)


def total(parts: list[list[Choice]], picked: tuple[int, ...]) -> tuple[int, float]:
    chosen = [choices[position] for choices, position in zip(parts, picked, strict=True)]
    return sum(choice.num_bytes for choice in chosen), sum(choice.damage for choice in chosen)


def every_pick(parts: list[list[Choice]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(choices)) for choices in parts)))


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(CHOICES, min_size=1, max_size=4), spare=st.integers(0, 150))
def test_no_choice_within_the_budget_is_better(parts: list[list[Choice]], spare: int) -> None:
    budget = sum(min(choice.num_bytes for choice in choices) for choices in parts) + spare
    size, damage = total(parts, allocate(parts, budget))
    assert size <= budget
    within = [total(parts, pick) for pick in every_pick(parts) if total(parts, pick)[0] <= budget]
    assert damage == pytest.approx(min(other for _, other in within))


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(CHOICES, min_size=1, max_size=4), spare=st.integers(0, 150))
def test_coarser_units_stay_within_the_budget(parts: list[list[Choice]], spare: int) -> None:
    budget = sum(min(choice.num_bytes for choice in choices) for choices in parts) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_CELLS", 7)
        assert total(parts, allocate(parts, budget))[0] <= budget


def test_what_is_free_is_not_taken_when_it_does_not_help() -> None:
    parts = [[Choice(4, 40, 1.0), Choice(8, 80, 1.0)], [Choice(4, 40, 1.0), Choice(8, 80, 0.0)]]
    assert allocate(parts, 1000) == (0, 1)


def test_a_budget_below_the_smallest_names_both() -> None:
    with pytest.raises(QuantizationError, match="budget of 7 bytes is below the 9") as caught:
        allocate([[Choice(4, 4, 1.0)], [Choice(4, 5, 1.0)]], 7)
    assert caught.value.code == "quantize.budget"


@pytest.mark.parametrize("parts", [[[]], [[Choice(4, 4, float("nan"))]]])
def test_what_cannot_be_weighed_is_refused(parts: list[list[Choice]]) -> None:
    with pytest.raises(QuantizationError):
        allocate(parts, 10)
