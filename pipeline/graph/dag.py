"""Work units: what is to be done, as values.

A work unit is a function call whose output is named by its key before it runs: the fingerprint of everything that
affects its bytes, and nothing else. The output of a *durable* unit goes to the work store and is found there by every
later run. The output of a *passing* unit (hidden states on their way through the blocks, sums of one worker, factors)
stays with the worker that computed it, is handed to whoever needs it, and is computed again when that worker dies.

Nothing here knows where units run: see ``driver.py`` for the order, ``cluster.py`` for Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """What a work unit does; names its stage function and its folder in the work store."""

    EMBED = "embed"
    CALIBRATE = "calibrate"
    COMPARE = "compare"
    PROPAGATE = "propagate"
    ADD = "add"
    MERGE = "merge"
    COMPENSATE = "compensate"
    FACTOR = "factor"
    SENSE = "sense"
    APPRAISE = "appraise"
    SCALES = "scales"
    SOLVE = "solve"
    PACK = "pack"
    OUTER = "outer"
    FORWARD = "forward"
    SCORE = "score"
    CONTINUE = "continue"
    GENERATE = "generate"
    VERIFY = "verify"


WALKS = frozenset({Kind.EMBED, Kind.CALIBRATE, Kind.COMPARE, Kind.PROPAGATE, Kind.FORWARD})
"""Units whose output hidden states are part of, which one of the next block reads."""


class Stored(NamedTuple):
    """A place in the work store."""

    stage: str
    key: str


@dataclass(frozen=True)
class WorkUnit:
    """One call of a stage function.

    Attributes:
        kind: What it does.
        key: Fingerprint of everything that affects its output.
        params: JSON-serializable arguments of the stage function.
        needs: Units whose outputs it reads.
        after: Keys of units that it does not read but waits for when they are to run at all, so that what they free is
            freed before it adds to it.
        stand_ins: For the key of a need: places in the work store that hold what is read of it, so that it need not
            run when all of them are there (hidden states saved every few blocks).
        saves: Places in the work store that it fills besides its output.
        obsoletes: Places in the work store that nobody needs any more once it has run.
        is_durable: Whether its output goes to the work store.
        home: Units with one home run on one worker, as each reads what the one before left there; empty for none. What
            stands before a colon names the chain; the homes of a chain are spread over the workers.
        rank: How late it is wanted: of the units that can run, those with the lowest rank do.
        cost: Estimated seconds on one worker of the reference machine.
        out_bytes: Estimated size of its output.
        block: Decoder block that it works on; -1 for none.
        variant: Variant that it works for; empty for all.
        label: What to show to a person besides block and variant.
    """

    kind: Kind
    key: str
    params: Mapping[str, Any]
    needs: tuple[WorkUnit, ...] = ()
    after: tuple[str, ...] = ()
    stand_ins: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)
    saves: tuple[Stored, ...] = ()
    obsoletes: tuple[Stored, ...] = ()
    is_durable: bool = True
    home: str = ""
    rank: float = 0.0
    cost: float = 0.0
    out_bytes: float = 0.0
    block: int = -1
    variant: str = ""
    label: str = ""

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def place(self) -> Stored:
        """Where its output is in the work store, if it is durable."""
        return Stored(self.kind.value, self.key)

    @property
    def title(self) -> str:
        """For people: for example ``solve of block 3, q_proj+k_proj+v_proj, gptq-w4-g64``."""
        where = f"{self.kind} of block {self.block}" if self.block >= 0 else self.kind.value
        return ", ".join(part for part in (where, self.label, self.variant) if part)


IsThere = Callable[[WorkUnit], bool]
"""Whether a unit's output can be read without running it."""

IsStored = Callable[[Stored], bool]
"""Whether a place of the work store is filled."""


def open_needs(unit: WorkUnit, is_there: IsThere, is_stored: IsStored) -> list[WorkUnit]:
    """Return the needs that must run before the unit can: not there, and with nothing that stands in for them."""
    return [
        need
        for need in unit.needs
        if not is_there(need)
        and not ((places := unit.stand_ins.get(need.key)) and all(is_stored(place) for place in places))
    ]


def required_units(goals: Iterable[WorkUnit], is_there: IsThere, is_stored: IsStored) -> list[WorkUnit]:
    """Return the units that must run to reach the goals, each after those that it needs, in the order in which the
    goals ask for them. What a finished unit needed is not looked at."""
    order: dict[str, WorkUnit] = {}
    seen: set[str] = set()
    stack: list[tuple[WorkUnit, bool]] = [(unit, False) for unit in reversed(list(goals))]
    while stack:
        unit, is_expanded = stack.pop()
        if is_expanded:
            order[unit.key] = unit
            continue
        if unit.key in seen or is_there(unit):
            continue
        seen.add(unit.key)
        stack.append((unit, True))
        stack.extend((need, False) for need in reversed(open_needs(unit, is_there, is_stored)))
    return list(order.values())


def reachable_units(goals: Iterable[WorkUnit]) -> list[WorkUnit]:
    """Return every unit that the goals reach, each once."""
    seen: dict[str, WorkUnit] = {}
    stack = list(goals)
    while stack:
        unit = stack.pop()
        if unit.key not in seen:
            seen[unit.key] = unit
            stack.extend(unit.needs)
    return list(seen.values())
