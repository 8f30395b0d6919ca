"""How many bits each part of a model gets when all of them together may take so many bytes.

A *part* is what engines want at one width (q/k/v of a block, all experts of a block). Each can be had at several widths
for a price in bytes and a damage; wanted is the choice of least total damage within a budget: the multiple-choice
knapsack problem (Kellerer, Pferschy, Pisinger, *Knapsack Problems*, chapter 11). Damages add up only approximately, but
sizes do exactly, so the budget is kept to the byte.

Solved by dynamic programming over bytes in units of their common divisor, which layers of a model share: exact then.
Where that makes more than ``MAX_CELLS`` cells, sizes are rounded up to coarser units, which never exceeds the budget
and loses at most one unit for each part. Cost: parts x choices x cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import QuantizationError

MAX_CELLS = 200_000
"""Most units that a budget is counted in: with 400 parts of 6 choices 1.8 s (one core of a Xeon,
2026-11-26), and 80 MB for what was chosen."""


@dataclass(frozen=True)
class Choice:
    """One width that a part can have.

    Attributes:
        bits: The width.
        num_bytes: What the part takes then.
        damage: What it costs in quality; any unit, as long as it is the same for all parts. Finite.
    """

    bits: int
    num_bytes: int
    damage: float


def allocate(parts: Sequence[Sequence[Choice]], budget_bytes: int) -> tuple[int, ...]:
    """Return for each part the position of its choice: together within the budget, at the least total damage.

    Of choices of equal total damage the one that takes fewer bytes is made.

    Raises:
        QuantizationError: when even the smallest choices exceed the budget, a part has none, or a damage is not finite.
    """
    if any(not choices for choices in parts):
        raise QuantizationError("a part without any choice cannot be given bits")
    if not all(math.isfinite(choice.damage) for choices in parts for choice in choices):
        raise QuantizationError("a damage that is not finite cannot be weighed against others")
    least = [min(choice.num_bytes for choice in choices) for choices in parts]
    spare = budget_bytes - sum(least)
    if spare < 0:
        raise QuantizationError(
            f"a budget of {budget_bytes} bytes is below the {sum(least)} that everything takes at its smallest",
            code="quantize.budget",
            hint="allow smaller widths, or a larger budget",
        )
    extra = [[choice.num_bytes - low for choice in choices] for choices, low in zip(parts, least, strict=True)]
    unit = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    # More than everything at its largest is of no use.
    spare = min(spare, sum(map(max, extra)))
    unit *= max(1, -(-spare // (unit * MAX_CELLS)))
    cells = spare // unit
    best = np.zeros(cells + 1)
    chosen = np.zeros((len(parts), cells + 1), np.uint8)
    for part, (choices, sizes) in enumerate(zip(parts, extra, strict=True)):
        # The smaller one first: a larger one has to be strictly better.
        order = sorted(range(len(choices)), key=lambda position: sizes[position])
        found = np.full(cells + 1, np.inf)
        for position in order:
            taken = -(-sizes[position] // unit)
            if taken > cells:
                continue
            total = best[: cells + 1 - taken] + choices[position].damage
            is_better = total < found[taken:]
            found[taken:][is_better] = total[is_better]
            chosen[part, taken:][is_better] = position
        best = found
    # What is left over at the end is not used by anybody.
    left = int(np.argmin(best))
    picked = []
    for part in range(len(parts) - 1, -1, -1):
        position = int(chosen[part, left])
        picked.append(position)
        left -= -(-extra[part][position] // unit)
    return tuple(reversed(picked))
