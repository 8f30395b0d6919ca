"""Greedy continuations of smoke prompts with one block in memory at a time, and whether they degenerate."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline.skeleton.model import BlockCall, BlockForward, Skeleton
from pipeline.spec import PromptSpec

RESIDENT_BYTES = 2 << 30
"""Dense blocks are kept between tokens up to this much; a larger model is read again for every token."""

READ_SIZE = 2
"""Memory that it takes to read one more block, counted in dense blocks: itself, and what it is made of."""

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
    """Dense weights of blocks, read on demand, the most recently used dropped beyond a number of bytes, or when there
    is room for no more."""

    def __init__(
        self,
        load: Callable[[int], dict[str, Tensor]],
        dense: Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]],
        max_bytes: int = RESIDENT_BYTES,
        room_for: Callable[[int], int] = lambda num_bytes: num_bytes,
    ) -> None:
        """Start without blocks.

        Args:
            load: Reads a block.
            dense: Makes of it what is kept: what is computed with, so that it is made once.
            max_bytes: Most bytes of blocks that are kept.
            room_for: How much of so many more bytes there is room for.
        """
        self._load, self._dense, self._max_bytes, self._room_for = load, dense, max_bytes, room_for
        self._blocks: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()
        self._bytes: dict[int, int] = {}

    def __call__(self, index: int) -> Mapping[str, Tensor]:
        """Return the weights of one block by local name."""
        if index not in self._blocks:
            # Room for another like the largest so far is made first: it must not be there besides what goes. Blocks
            # come round in order, so the one used last is the one needed last.
            largest = max(self._bytes.values(), default=0)
            self._keep_at_most(self._max_bytes - largest)
            needed = READ_SIZE * largest
            while self._blocks and self._room_for(needed) < needed:
                # What was freed does not always come to be free: from now on fewer are kept.
                self._max_bytes = sum(self._bytes.values())
                self._keep_at_most(self._max_bytes - 1)
            weights = self._dense(index, self._load(index))
            self._blocks[index] = weights
            self._bytes[index] = sum(tensor.nbytes for tensor in weights.values())
        self._blocks.move_to_end(index)
        return self._blocks[index]

    def _keep_at_most(self, num_bytes: int) -> None:
        while self._blocks and sum(self._bytes.values()) > num_bytes:
            stale, _ = self._blocks.popitem()
            del self._bytes[stale]


@torch.no_grad()
def continue_greedily(
    skeleton: Skeleton,
    load: Callable[[int], Mapping[str, Tensor]],
    prompt_ids: Sequence[int],
    max_tokens: int,
    end_ids: frozenset[int],
) -> tuple[int, ...]:
    """Return up to ``max_tokens`` most likely token ids after a prompt, ended by any of ``end_ids`` (not included).

    The model's own forward and key-value cache are used; only its blocks' weights come and go. Needs
    ``attach_outer``.
    """

    def run(index: int, forward: BlockForward, call: BlockCall, hidden: Tensor) -> Any:
        with skeleton.attached(index, load(index)):
            return call.run_raw(forward, hidden)

    ids: list[int] = []
    step = torch.tensor([list(prompt_ids)], device=skeleton.device)
    past: Any = None
    with skeleton.blocks_replaced(run):
        for _ in range(max_tokens):
            output = skeleton.net(input_ids=step, past_key_values=past, use_cache=True)
            token = int(output.logits[0, -1].argmax())
            if token in end_ids:
                break
            ids.append(token)
            past, step = output.past_key_values, torch.tensor([[token]], device=skeleton.device)
    return tuple(ids)


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
