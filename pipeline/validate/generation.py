"""Greedy continuations of smoke prompts with one block in memory at a time, and whether they degenerate.

A token follows from all weights, and reading them takes longer than computing with them. So as many tokens as can be
pass the blocks together: the next ones of all prompts, and drafts of what comes after them (speculative decoding,
Leviathan et al. 2023, arXiv:2211.17192: the model's own choice counts at every position, so a draft that is wrong costs
time and changes no token). A variant's draft is what the source said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline.skeleton.calls import BlockCall, cache_among
from pipeline.skeleton.model import Skeleton
from pipeline.spec import PromptSpec

FIRST_TRIED_TOKENS = 8
"""Tokens of a draft that pass first; those after them do when all of these are kept."""

ROWS = 4
"""Rows of a batch are a multiple of this: matrix products with two or three take longer than with four (1.2 and 1.8
times for 1,536 x 576 and 49,152 x 576 float32 weights on one thread of a CPU with AVX-512, torch 2.13.0)."""

READ_SIZE = 2
"""Memory that it takes to read one more block, counted in dense blocks: itself, and what it is made of."""

SLACK_BYTES = 32_000_000
"""Memory that is left to the allocator when blocks are kept: what blocks that come and go have freed in pieces. The
more it is, the more rarely freed memory has to be given back: once for every ``READS_PER_SLACK`` times as much that was
read, as each time the system has to clear pages again."""

READS_PER_SLACK = 4
"""See ``SLACK_BYTES``."""

RUN_LENGTH = 8
"""A token this many times in a row is degenerate."""

MAX_PERIOD, LOOP_REPEATS, LOOP_TOKENS, LOOP_SHARE = 16, 4, 8, 0.75
"""A continuation is degenerate when it ends in a loop: up to MAX_PERIOD tokens that come LOOP_REPEATS times or more, in
all at least LOOP_TOKENS tokens and LOOP_SHARE of the continuation. Text that repeats with a purpose (a refrain, a
table, sentences of one pattern) stays below that, and so does every stretch of the shipped held-out text."""

MIN_DISTINCT = 0.15
"""Fewer distinct tokens than this share of the continuation is degenerate."""


class Fault(StrEnum):
    """A way of being degenerate."""

    EMPTY = "nothing"
    RUN = "run"
    LOOP = "loop"
    POOR = "few distinct tokens"


@dataclass(frozen=True)
class Degeneracy:
    """Why a continuation is degenerate.

    Attributes:
        kind: The first fault, in the order of ``Fault``.
        text: The same with numbers.
    """

    kind: Fault
    text: str


@dataclass(frozen=True)
class Judgement:
    """What is to be said of a variant's continuation; both are empty when nothing is.

    Attributes:
        fault: What is held against the variant.
        excused: In what way it is degenerate as the source's own continuation is.
    """

    fault: str
    excused: str


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt.

    Attributes:
        ids: Generated token ids, without an end token.
        text: The same as text.
    """

    ids: tuple[int, ...]
    text: str


class BlockCache:
    """Weights of blocks, read on demand, and kept for the next pass as far as there is room.

    Blocks come round in order, so keeping the first ones saves as many reads as anything. They are kept as the model
    computes with them where all of them fit so, since converting takes longer than a token does; else as they are read,
    which is often half as much.
    """

    def __init__(
        self,
        load: Callable[[int], dict[str, Tensor]],
        dense: Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]],
        max_bytes: int,
        dense_bytes: int,
        room_for: Callable[[int], int] = lambda num_bytes: num_bytes,
    ) -> None:
        """Read blocks with ``load``, which ``dense`` makes ready for computing.

        Args:
            load: Gives the weights of one block by local name.
            dense: Converts them, and uses them up.
            max_bytes: Memory to keep blocks in.
            dense_bytes: What all blocks take when they are converted.
            room_for: How much of so many more bytes there is room for now, after what is freed was given back if need
                be.
        """
        self._load, self._dense, self._room_for = load, dense, room_for
        self._free_bytes, self._is_kept_dense = max_bytes, dense_bytes <= max_bytes
        self._kept: dict[int, Mapping[str, Tensor]] = {}
        self._passing_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """What the blocks that are kept take."""
        return sum(tensor.nbytes for weights in self._kept.values() for tensor in weights.values())

    def __call__(self, index: int) -> Mapping[str, Tensor]:
        """Return the weights of one block by local name."""
        if index not in self._kept:
            read = self._load(index)
            weights = self._dense(index, read) if self._is_kept_dense else read
            num_bytes = sum(tensor.nbytes for tensor in weights.values())
            reading, keeping = READ_SIZE * num_bytes, READ_SIZE * num_bytes + SLACK_BYTES
            if num_bytes > self._free_bytes or self._room_for(keeping) < keeping:
                # What is there stays; another one would leave no room to read those after it.
                self._free_bytes = 0
                # Hundreds of blocks come and go in one unit, and what they leave behind adds up.
                self._passing_bytes += num_bytes
                if self._passing_bytes >= READS_PER_SLACK * SLACK_BYTES:
                    self._passing_bytes = 0
                    self._room_for(reading)
                # Not in memory twice: what is attached as it was read is still there when it has been converted.
                return weights if self._is_kept_dense else self._dense(index, read)
            self._kept[index] = weights
            self._free_bytes -= num_bytes
        return self._kept[index]


@dataclass(frozen=True)
class Step:
    """What a pass adds to a sequence.

    Attributes:
        ids: The tokens, without an end token.
        has_ended: Whether an end token follows them.
    """

    ids: tuple[int, ...]
    has_ended: bool


@dataclass
class _Sequence:
    """A prompt that is being continued.

    Attributes:
        ids: Its tokens and those that continue it.
        max_length: How many tokens they may become.
        guide: What they may become; longer than the prompt where there is a draft.
        has_ended: Whether an end token came.
    """

    ids: list[int]
    max_length: int
    guide: list[int]
    has_ended: bool = False

    @property
    def is_running(self) -> bool:
        """Whether it is to be continued."""
        return not self.has_ended and len(self.ids) < self.max_length

    def draft(self, max_tokens: int) -> list[int]:
        """Return the tokens that may come next, as long as all before were the guide's; the last one that is asked for
        follows from those before it."""
        if not self.is_running or self.guide[: len(self.ids)] != self.ids:
            return []
        return self.guide[len(self.ids) : self.max_length - 1][:max_tokens]

    def add(self, step: Step) -> None:
        """Append what a pass gave."""
        self.ids += step.ids
        self.has_ended = step.has_ended


@dataclass
class _Batch:
    """Sequences that pass the blocks side by side, all at the same position.

    So nothing is padded, which models would have to be told of in ways of their own: a longer prompt's last tokens pass
    while shorter ones are continued already.

    Attributes:
        sequences: The sequences.
        past: The model's cache with keys and values of their first ``num_passed`` tokens; None without any.
        num_passed: See ``past``.
    """

    sequences: list[_Sequence]
    past: Any = None
    num_passed: int = 0

    @property
    def is_running(self) -> bool:
        """Whether one of them is to be continued."""
        return any(sequence.is_running for sequence in self.sequences)

    @property
    def num_known(self) -> int:
        """Number of first tokens that are known of all that are to be continued."""
        return min(len(sequence.ids) for sequence in self.sequences if sequence.is_running)

    def next_tokens(self) -> Tensor:
        """Return the known tokens that have yet to pass, [batch, length]; those that have ended go on with anything."""
        rows = [sequence.ids[self.num_passed : self.num_known] for sequence in self.sequences]
        if len(rows) > 1:
            rows += [[]] * (-len(rows) % ROWS)
        length = self.num_known - self.num_passed
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])


@torch.no_grad()
def continue_greedily(
    skeleton: Skeleton,
    load: Callable[[int], Mapping[str, Tensor]],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_ids: frozenset[int],
    drafts: Sequence[Sequence[int]] = (),
) -> list[tuple[int, ...]]:
    """Return for each prompt up to ``max_tokens`` most likely token ids after it, ended by any of ``end_ids`` (not
    included).

    The model's own forward and key-value cache are used; only its blocks' weights come and go. First every prompt
    passes the blocks with its draft, of which is kept what the model itself would have chosen. Then those that are not
    done go on token by token, side by side. So drafts, and which prompts there are, change no token but by rounding.
    Needs ``attach_outer``.

    Args:
        skeleton: The model.
        load: Gives the weights of one block by local name.
        prompts: Token ids of each prompt.
        max_tokens: How many tokens to add to each at most.
        end_ids: Tokens that end a continuation.
        drafts: What likely continues each prompt, such as another model's continuation; none, or one for each.
    """
    sequences = [
        _Sequence(list(ids), len(ids) + max_tokens, [*ids, *draft])
        for ids, draft in zip(prompts, drafts or [()] * len(prompts), strict=True)
    ]
    _try_drafts(skeleton, load, sequences, end_ids)
    batches = _batches([sequence for sequence in sequences if sequence.is_running], max_tokens)
    while running := [batch for batch in batches if batch.is_running]:
        _add_tokens(skeleton, load, running, end_ids)
    return [tuple(sequence.ids[len(ids) :]) for sequence, ids in zip(sequences, prompts, strict=True)]


def _batches(sequences: Sequence[_Sequence], max_tokens: int) -> list[_Batch]:
    """Return sequences put together where that takes fewer passes than one after the other would."""
    batches: list[_Batch] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.ids)):
        if batches and len(sequence.ids) - batches[-1].num_known < max_tokens:
            batches[-1].sequences.append(sequence)
        else:
            batches.append(_Batch([sequence]))
    return batches


def _try_drafts(
    skeleton: Skeleton,
    load: Callable[[int], Mapping[str, Tensor]],
    sequences: Sequence[_Sequence],
    end_ids: frozenset[int],
) -> None:
    """Continue sequences by their drafts as far as the model agrees, and by a token of its own."""
    pasts: list[Any] = [None] * len(sequences)
    for max_tokens in (FIRST_TRIED_TOKENS, max(sequence.max_length for sequence in sequences)):
        drafts = [(number, s, s.draft(max_tokens)) for number, s in enumerate(sequences) if s.draft(max_tokens)]
        entered = []
        for number, sequence, draft in drafts:
            # A cache that is there was filled by a draft that was kept as a whole: it lacks the last token alone.
            tokens = sequence.ids if pasts[number] is None else sequence.ids[-1:]
            entered.append(skeleton.calls_after(torch.tensor([[*tokens, *draft]]), pasts[number]))
        left = _pass_blocks(skeleton, load, entered) if entered else []
        for (number, sequence, draft), (calls, _), states_BLH in zip(drafts, entered, left, strict=True):
            logits_LV = skeleton.logits(states_BLH[:, -len(draft) - 1 :])[0]
            sequence.add(judge_draft(logits_LV, draft, end_ids))
            pasts[number] = cache_among(calls)


def _add_tokens(
    skeleton: Skeleton,
    load: Callable[[int], Mapping[str, Tensor]],
    batches: Sequence[_Batch],
    end_ids: frozenset[int],
) -> None:
    """Continue the shortest sequences of each batch by a token."""
    entered = [skeleton.calls_after(batch.next_tokens(), batch.past) for batch in batches]
    left = _pass_blocks(skeleton, load, entered)
    for batch, (calls, _), states_BLH in zip(batches, entered, left, strict=True):
        num_known, logits_BLV = batch.num_known, skeleton.logits(states_BLH[:, -1:])
        for sequence, logits_LV in zip(batch.sequences, logits_BLV, strict=False):  # rows may have been added
            if sequence.is_running and len(sequence.ids) == num_known:
                sequence.add(judge_draft(logits_LV, (), end_ids))
        batch.past = cache_among(calls)
        batch.num_passed = 0 if batch.past is None else num_known


def _pass_blocks(
    skeleton: Skeleton,
    load: Callable[[int], Mapping[str, Tensor]],
    entered: Sequence[tuple[Sequence[BlockCall], Tensor]],
) -> list[Tensor]:
    """Return the hidden states that leave the last block, of each of several calls with the states that enter the
    first; a block is attached once for all of them."""
    hidden = [states_BLH for _, states_BLH in entered]
    for index in range(skeleton.num_blocks):
        with skeleton.attached(index, load(index)) as block:
            hidden = [calls[index].run(block, states) for (calls, _), states in zip(entered, hidden, strict=True)]
    return hidden


def judge_draft(logits_LV: Tensor, draft: Sequence[int], end_ids: frozenset[int]) -> Step:
    """Return what a model makes of a draft: its own choices up to the first one that is not the draft's, which it
    replaces, or with one token after all of it.

    Args:
        logits_LV: Logits [length, vocabulary] of the last certain token and of each of the draft.
        draft: Token ids [length - 1].
        end_ids: Tokens that end a sequence.
    """
    choices = logits_LV.argmax(-1).tolist()
    num_kept = next((n for n, token in enumerate(draft) if choices[n] != token), len(draft))
    ids = choices[: num_kept + 1]
    num_before_end = next((n for n, token in enumerate(ids) if token in end_ids), len(ids))
    return Step(tuple(ids[:num_before_end]), num_before_end < len(ids))


def degeneracy(ids: Sequence[int]) -> Degeneracy | None:
    """Return why a continuation is degenerate, or None."""
    if not ids:
        return Degeneracy(Fault.EMPTY, "nothing was generated")
    longest, run = 1, 1
    for before, after in pairwise(ids):
        run = run + 1 if before == after else 1
        longest = max(longest, run)
    if longest >= RUN_LENGTH:
        return Degeneracy(Fault.RUN, f"one token {longest} times in a row")
    for period in range(2, MAX_PERIOD + 1):
        tail = _periodic_tail(ids, period)
        if tail >= max(LOOP_REPEATS * period, LOOP_TOKENS, LOOP_SHARE * len(ids)):
            return Degeneracy(Fault.LOOP, f"the last {tail} tokens repeat {period}")
    if len(set(ids)) < MIN_DISTINCT * len(ids):
        return Degeneracy(Fault.POOR, f"only {len(set(ids))} distinct tokens in {len(ids)}")
    return None


def _periodic_tail(ids: Sequence[int], period: int) -> int:
    """Return how many of the last tokens are equal to the one ``period`` before, and the first ``period`` of them."""
    tail = min(period, len(ids))
    while tail < len(ids) and ids[-tail - 1] == ids[period - tail - 1]:
        tail += 1
    return tail


def judge_continuation(prompt: PromptSpec, source: Continuation, variant: Continuation) -> Judgement:
    """Return what is wrong with a variant's continuation.

    Degenerate text is not held against a variant whose source is degenerate in the same way on the same prompt.
    """
    own, expected = degeneracy(variant.ids), degeneracy(source.ids)
    excused = ""
    if own is not None:
        if expected is None or own.kind is not expected.kind:
            return Judgement(f"{prompt.prompt!r}: {own.text}", "")
        excused = f"{prompt.prompt!r}: {own.text}"
    if prompt.expect and not re.search(prompt.expect, variant.text):
        return Judgement(f"{prompt.prompt!r}: {variant.text[:80]!r} does not match {prompt.expect!r}", excused)
    return Judgement("", excused)
