"""The comparison of logits: the compiled loop, the same with torch, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.validate.divergence import Divergence, _compare, _compare_anywhere, compare_predictions


def logits_like(
    seed: int, positions: int, vocabulary: int, spread: float, distance: float
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(positions, vocabulary, generator=generator) * spread
    variant = source + torch.randn(positions, vocabulary, generator=generator) * distance
    return source, variant, torch.randint(0, vocabulary, (positions,), generator=generator)


def oracle(source: Tensor, variant: Tensor, targets: Tensor) -> Divergence:
    a, b = source.double().log_softmax(-1), variant.double().log_softmax(-1)
    picked = targets[:, None]
    return Divergence(
        targets.numel(),
        -float(a.gather(1, picked).sum()),
        -float(b.gather(1, picked).sum()),
        float((a.exp() * (a - b)).sum()),
        int((source.argmax(-1) == variant.argmax(-1)).sum()),
    )


@given(
    seed=st.integers(0, 1 << 30),
    positions=st.integers(1, 5),
    vocabulary=st.integers(2, 400),
    spread=st.sampled_from([1e-3, 1.0, 5.0, 40.0, 300.0]),
    distance=st.sampled_from([0.0, 1e-3, 0.3, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_both_ways_are_close_to_float64(
    seed: int, positions: int, vocabulary: int, spread: float, distance: float
) -> None:
    case = logits_like(seed, positions, vocabulary, spread, distance)
    wanted = oracle(*case)
    for found, tolerance in ((_compare(*case), 2e-6), (_compare_anywhere(*case), 2e-5)):
        assert (found.num_tokens, found.num_agreeing) == (wanted.num_tokens, wanted.num_agreeing)
        room = tolerance * positions * (1 + spread + distance)
        assert found.source_nll == pytest.approx(wanted.source_nll, abs=room)
        assert found.variant_nll == pytest.approx(wanted.variant_nll, abs=room)
        assert found.kl == pytest.approx(wanted.kl, abs=room, rel=tolerance)


def test_a_good_variant_has_the_digits_of_its_small_divergence() -> None:
    case = logits_like(3, 50, 49152, 4.0, 1e-3)
    wanted = oracle(*case).kl
    assert wanted < 1e-4
    assert _compare(*case).kl == pytest.approx(wanted, rel=2e-2)


def test_a_token_that_both_rule_out_adds_nothing() -> None:
    source, variant, targets = logits_like(5, 3, 100, 2.0, 0.5)
    masked_source, masked_variant = (torch.cat([x, torch.full((3, 28), -math.inf)], 1) for x in (source, variant))
    wanted, found = oracle(source, variant, targets), _compare(masked_source, masked_variant, targets)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-5)
    assert found.variant_nll == pytest.approx(wanted.variant_nll, rel=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("whose", [0, 1])
def test_what_is_not_finite_gives_no_figures(broken: float, whose: int) -> None:
    case = logits_like(7, 2, 130, 2.0, 0.5)
    case[whose][1, 77] = broken
    found = _compare(*case)
    assert not math.isfinite(found.kl)
    assert not math.isfinite(found.variant_nll)


def test_cutting_a_sequence_into_parts_changes_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    source, variant, _ = logits_like(11, 9, 200, 3.0, 0.5)
    tokens = torch.arange(9)

    def found(elements: int) -> Divergence:
        monkeypatch.setattr("pipeline.validate.divergence.CHUNK_ELEMENTS", elements)
        return compare_predictions(lambda hidden: hidden, source, variant, tokens, 200)

    whole, parts = found(1 << 23), found(400)
    assert whole.num_agreeing == parts.num_agreeing
    assert whole.kl == pytest.approx(parts.kl, rel=1e-12)
