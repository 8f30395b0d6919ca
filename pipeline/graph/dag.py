"""Work units with dependencies, content keys, and resume.

A work unit is a function call whose output is named by its key before it runs: the fingerprint of everything that
affects its bytes, including the keys of the units it depends on. A unit whose output is already in the work store is
finished; a unit that only unfinished units of no one's interest would need is not run. So the same call that starts a
job also resumes it, with another number of workers or after a kill at any point.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from pipeline.errors import GraphError
from pipeline.storage.work import StageRecord, WorkStore


class Kind(StrEnum):
    """What a work unit does."""

    EMBED = "embed"
    CALIBRATE = "calibrate"
    MERGE = "merge"
    SCALES = "scales"
    SOLVE = "solve"
    PACK = "pack"
    OUTER = "outer"
    EVALUATE = "evaluate"
    GENERATE = "generate"


@dataclass(frozen=True)
class WorkUnit:
    """One call of a stage function.

    Attributes:
        kind: What it does; names the stage function and the folder of the work store.
        key: Fingerprint of everything that affects its output.
        params: JSON-serializable arguments of the stage function.
        needs: Units whose outputs it reads.
        cost: Estimated work, in FLOPs; for the estimate of the time that is left.
        block: Decoder block that it works on; -1 for none.
        variant: Variant that it works for; empty for all.
        label: What to show to a person besides block and variant.
    """

    kind: Kind
    key: str
    params: dict[str, Any]
    needs: tuple[WorkUnit, ...] = ()
    cost: float = 0.0
    block: int = -1
    variant: str = ""
    label: str = ""

    def __hash__(self) -> int:
        return hash(self.key)


class Executor(Protocol):
    """Runs work units somewhere."""

    @property
    def num_slots(self) -> int:
        """How many units to have in flight."""
        ...

    def submit(self, unit: WorkUnit) -> None:
        """Start a unit."""
        ...

    def wait(self) -> tuple[WorkUnit, StageRecord, float]:
        """Return a unit that has finished since the last call, its record, and the seconds that it ran.

        Raises:
            PipelineError: as the unit raised it.
        """
        ...

    def close(self) -> None:
        """Stop what is running."""
        ...


Finished = Callable[[WorkUnit, StageRecord, float, bool], None]
"""Called for every unit in the graph that is finished: unit, record, seconds, and whether it was there before."""


@dataclass
class _Progress:
    records: dict[str, StageRecord] = field(default_factory=dict)
    waiting_for: dict[str, int] = field(default_factory=dict)
    dependents: dict[str, list[WorkUnit]] = field(default_factory=dict)
    ready: list[tuple[int, WorkUnit]] = field(default_factory=list)


def required_units(goals: Iterable[WorkUnit], work: WorkStore) -> tuple[list[WorkUnit], dict[str, StageRecord]]:
    """Return the units that must run to reach the goals, in an order that respects dependencies, and the records
    of the units that are there already. A finished unit's own dependencies are not looked at."""
    missing: dict[str, WorkUnit] = {}
    present: dict[str, StageRecord] = {}
    order: list[WorkUnit] = []
    stack: list[tuple[WorkUnit, bool]] = [(unit, False) for unit in reversed(list(goals))]
    while stack:
        unit, expanded = stack.pop()
        if expanded:
            order.append(unit)
            continue
        if unit.key in missing or unit.key in present:
            continue
        record = work.lookup(unit.kind.value, unit.key)
        if record is not None:
            present[unit.key] = record
            continue
        missing[unit.key] = unit
        stack.append((unit, True))
        stack.extend((need, False) for need in reversed(unit.needs))
    return order, present


def run_units(
    goals: Sequence[WorkUnit],
    work: WorkStore,
    executor: Executor,
    finished: Finished,
    discard: Callable[[WorkUnit], Iterable[WorkUnit]] | None = None,
) -> dict[str, StageRecord]:
    """Run what the goals need and return the records of all goals by key.

    Units start in the order in which the goals need them, as many as the executor has slots for. After an
    interruption the same call continues: finished units are found in the work store.

    Args:
        goals: The units whose outputs are wanted.
        work: Where outputs are kept.
        executor: Where units run.
        finished: Told of every finished unit.
        discard: Given a finished unit, names units whose outputs nobody will read again.

    Raises:
        PipelineError: the first failure of a unit; units that run beside it are stopped.
    """
    order, present = required_units(goals, work)
    by_key = {unit.key: unit for unit in order}
    progress = _Progress(records=dict(present))
    for unit in reachable_units(goals):
        if unit.key in present:
            finished(unit, present[unit.key], 0.0, True)
    for position, unit in enumerate(order):
        open_needs = [need for need in unit.needs if need.key in by_key]
        progress.waiting_for[unit.key] = len(open_needs)
        for need in open_needs:
            progress.dependents.setdefault(need.key, []).append(unit)
        if not open_needs:
            heapq.heappush(progress.ready, (position, unit))
    positions = {unit.key: position for position, unit in enumerate(order)}
    running = 0
    while progress.ready or running:
        while progress.ready and running < executor.num_slots:
            executor.submit(heapq.heappop(progress.ready)[1])
            running += 1
        unit, record, seconds = executor.wait()
        running -= 1
        progress.records[unit.key] = record
        finished(unit, record, seconds, False)
        for dependent in progress.dependents.get(unit.key, []):
            progress.waiting_for[dependent.key] -= 1
            if progress.waiting_for[dependent.key] == 0:
                heapq.heappush(progress.ready, (positions[dependent.key], dependent))
        for stale in discard(unit) if discard else ():
            work.discard(stale.kind.value, stale.key)
    stuck = [unit for unit in order if unit.key not in progress.records]
    if stuck:
        raise GraphError(
            f"{len(stuck)} work units wait for each other, first {stuck[0].kind} of block {stuck[0].block}"
        )
    return {unit.key: progress.records[unit.key] for unit in goals}


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


class InlineExecutor:
    """Runs each unit in this process when it is waited for: the reference that Ray is compared with."""

    num_slots = 1

    def __init__(self, run: Callable[[WorkUnit], StageRecord], clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._queue: list[WorkUnit] = []

    def submit(self, unit: WorkUnit) -> None:
        """Queue a unit."""
        self._queue.append(unit)

    def wait(self) -> tuple[WorkUnit, StageRecord, float]:
        """Run the oldest queued unit."""
        unit = self._queue.pop(0)
        start = self._clock()
        return unit, self._run(unit), self._clock() - start

    def close(self) -> None:
        """Nothing runs between calls."""
