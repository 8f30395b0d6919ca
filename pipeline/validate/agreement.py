"""Whether tokens that somebody else chose are what our reference would choose, up to near ties.

Whoever computes on another machine or in 16 bit rounds otherwise, and one token chosen otherwise changes all that
follow. So the reference does not continue by itself: it is given the other's tokens, and each must be its own choice
or nearly so. Weights that mean something else do not pass, however fluent their text is.

Dimension suffixes: L = length, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

NEAR_TIE = 0.15
"""Largest lead, in units of the standard deviation of the logits, that another token may have over the chosen one in
our reference. Engines compute in 16 bit: near ties of 0.05 at a spread of 1.3 were seen without any error."""


@dataclass(frozen=True)
class Agreement:
    """Choices against the reference.

    Attributes:
        total: Choices that were judged.
        agreeing: Those that are the reference's own.
        worst_gap: Widest lead of the reference's own choice over the one made, in standard deviations of the logits;
            infinite where the reference has no finite logits.
    """

    total: int = 0
    agreeing: int = 0
    worst_gap: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        worst = max(self.worst_gap, other.worst_gap)
        return Agreement(self.total + other.total, self.agreeing + other.agreeing, worst)

    @property
    def is_near(self) -> bool:
        """Whether every choice is the reference's own or a near tie; nothing judged is no agreement."""
        return self.total > 0 and self.worst_gap <= NEAR_TIE

    @property
    def words(self) -> str:
        """The figures in words, for a check's detail."""
        return (
            f"{self.agreeing} of {self.total} greedy tokens as the reference, widest gap {self.worst_gap:.4f} of the "
            "logits' spread"
        )


def compare_choices(logits_LV: Tensor, ids: Sequence[int], start: int) -> Agreement:
    """Return how the tokens from position ``start`` on agree with the logits of the position before each.

    Args:
        logits_LV: float32 logits of the reference for the sequence [length, vocabulary].
        ids: The sequence's token ids [length], prompt first.
        start: First position that was chosen and not given; at least 1.
    """
    judged = (compare_choice(logits_LV[position - 1], [ids[position]]) for position in range(start, len(ids)))
    return sum(judged, Agreement())


def compare_choice(logits_V: Tensor, choices: Collection[int]) -> Agreement:
    """Return how the likeliest of ``choices`` agrees with the logits [vocabulary] that it was chosen by.

    Choices that are not in the vocabulary, and none at all, do not agree.
    """
    known = [choice for choice in choices if 0 <= choice < logits_V.shape[0]]
    gap = float((logits_V.max() - logits_V[known].max()) / logits_V.std()) if known else math.inf
    return Agreement(1, int(gap == 0.0), math.inf if math.isnan(gap) else gap)
