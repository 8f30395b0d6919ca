"""How much of the held-out tokens calibration has seen too: laws, and an oracle that is slow and plain."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.calibrate.tokens import TokenBatch, overlap
from pipeline.facts import OVERLAP_TOKENS

W = OVERLAP_TOKENS
TEXT = st.lists(st.integers(0, 2**17), min_size=1, max_size=3 * W)
PERIODIC = st.builds(lambda unit, size: (unit * size)[:size], st.lists(st.integers(0, 3), min_size=1, max_size=5),
                     st.integers(1, 3 * W))  # fmt: skip


def batch(ids: list[int]) -> TokenBatch:
    return TokenBatch(torch.tensor(ids)[None], "text", "digest")


def plain_overlap(calibration: list[int], heldout: list[int]) -> float:
    width = min(W, len(heldout))
    seen = {tuple(calibration[start : start + width]) for start in range(len(calibration) - width + 1)}
    covered = set()
    for start in range(len(heldout) - width + 1):
        if tuple(heldout[start : start + width]) in seen:
            covered |= set(range(start, start + width))
    return len(covered) / len(heldout)


@settings(deadline=None)
@given(st.data())
def test_it_is_what_the_oracle_counts(data: st.DataObject) -> None:
    ids = data.draw(TEXT | PERIODIC)
    other = data.draw(TEXT | PERIODIC)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids)))))
    at = data.draw(st.integers(0, len(other)))
    heldout = other[:at] + ids[start:stop] + other[at:]
    assert overlap(batch(ids), batch(heldout)) == plain_overlap(ids, heldout)


@settings(deadline=None)
@given(TEXT)
def test_what_is_contained_is_seen_whole_and_new_tokens_are_not(ids: list[int]) -> None:
    assert overlap(batch([*ids, 1, 2, 3]), batch(ids)) == 1.0
    assert overlap(batch(ids), batch([token + 2**18 for token in ids])) == 0.0


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**17), min_size=W, max_size=2 * W), st.integers(0, W - 1))
def test_a_run_that_is_too_short_does_not_count(ids: list[int], length: int) -> None:
    fresh = [2**18 + number for number in range(W)]
    assert overlap(batch(ids), batch(fresh + ids[:length] + fresh)) == 0.0
    share = W / (2 * len(fresh) + W)
    assert overlap(batch(ids), batch(fresh + ids[:W] + fresh)) == share


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**17), min_size=4 * W, max_size=4 * W), st.sampled_from([8, 16, W, 2 * W]))
def test_how_a_text_is_cut_into_sequences_does_not_matter(ids: list[int], length: int) -> None:
    cut = TokenBatch(torch.tensor(ids).view(-1, length), "text", "digest")
    whole = batch(ids[: 3 * W])
    assert overlap(cut, whole) == overlap(batch(ids), whole) == 1.0
    assert overlap(whole, cut) == overlap(whole, batch(ids)) >= 0.75
