"""How a simulated conversion went: its time, what its end waited for, and what moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.executor import WorkerId


class Limit(StrEnum):
    """What the end of a schedule waited for."""

    FORWARD = "forward chain"
    REDUCTION = "adding up statistics"
    SOLVES = "solves"
    PACKING = "packing"
    GENERATION = "generation and scores"
    WEIGHTS = "weight reads"
    STORE = "work store"
    NETWORK = "moving outputs between workers"


LIMIT_OF: dict[Kind, Limit] = {
    Kind.EMBED: Limit.FORWARD,
    Kind.CALIBRATE: Limit.FORWARD,
    Kind.FORWARD: Limit.FORWARD,
    Kind.ADD: Limit.REDUCTION,
    Kind.MERGE: Limit.REDUCTION,
    Kind.FACTOR: Limit.SOLVES,
    Kind.SCALES: Limit.SOLVES,
    Kind.SOLVE: Limit.SOLVES,
    Kind.PACK: Limit.PACKING,
    Kind.OUTER: Limit.PACKING,
    Kind.SCORE: Limit.GENERATION,
    Kind.CONTINUE: Limit.GENERATION,
    Kind.GENERATE: Limit.GENERATION,
    Kind.VERIFY: Limit.WEIGHTS,
}


@dataclass(frozen=True)
class Cluster:
    """Where a conversion would run.

    Attributes:
        nodes: Machines.
        workers: Workers of each.
    """

    nodes: int
    workers: int

    @property
    def num_workers(self) -> int:
        """Workers of all nodes."""
        return self.nodes * self.workers


@dataclass(frozen=True)
class Ran:
    """How one unit ran.

    Attributes:
        unit: Which.
        worker: Where.
        begin_s: When its turn had come.
        compute_s: When everything it reads was there.
        computed_s: When it had computed.
        end_s: When its output was there.
        waited_for: What it waited for before it could compute.
        before: The units that ended before it began, one of which it waited for: on its worker, and what caused it.
    """

    unit: WorkUnit
    worker: WorkerId
    begin_s: float
    compute_s: float
    computed_s: float
    end_s: float
    waited_for: Limit
    before: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """How a conversion would go.

    Attributes:
        cluster: Where.
        hardware: What the rates are of, and how they are known.
        seconds: From the first unit to the last.
        num_units: Work units.
        busy_shares: Of each worker, the share of the time for which it computed.
        bottleneck: What the end waited for longest.
        waits: Seconds that the end waited for each thing, along the chain of units that led to it; they add up to
            ``seconds``.
        tail_s: Seconds at the end in which fewer than half of the workers had something to do.
        moved_bytes: Bytes by kind of unit and how they went.
        held_bytes: Most bytes of passing outputs that one worker held.
        busy_links: Share of the time for which the busiest node's link was busy: to the store, and into the node.
    """

    cluster: Cluster
    hardware: str
    seconds: float
    num_units: int
    busy_shares: tuple[float, ...]
    bottleneck: str
    waits: Mapping[str, float]
    tail_s: float
    moved_bytes: Mapping[str, Mapping[str, float]]
    held_bytes: float
    busy_links: Mapping[str, float]

    @property
    def busy_share(self) -> float:
        """The workers' mean share of busy time."""
        return sum(self.busy_shares) / len(self.busy_shares)


def critical_waits(ran: Mapping[str, Ran]) -> dict[Limit, float]:
    """Return for how long the end of a schedule waited for what: back from the unit that ended last, always to the
    one whose end had it begin."""
    waits: dict[Limit, float] = {}

    def add(limit: Limit, seconds: float) -> None:
        if seconds > 0:
            waits[limit] = waits.get(limit, 0.0) + seconds

    step = max(ran.values(), key=lambda one: one.end_s, default=None)
    while step is not None:
        add(LIMIT_OF[step.unit.kind], step.computed_s - step.compute_s)
        add(step.waited_for, step.compute_s - step.begin_s)
        add(Limit.STORE, step.end_s - step.computed_s)
        earlier = [ran[key] for key in (*(need.key for need in step.unit.needs), *step.before) if key in ran]
        step = max((one for one in earlier if one.end_s <= step.begin_s), key=lambda one: one.end_s, default=None)
    return waits


def tail_seconds(ran: Iterable[Ran], num_workers: int, end_s: float) -> float:
    """Return the seconds at the end in which fewer than half of the workers had something to do."""
    changes = sorted(change for one in ran for change in ((one.begin_s, 1), (one.end_s, -1)))
    active, last_s = 0, 0.0
    for time_s, change in changes:
        if 2 * active >= num_workers:
            last_s = time_s
        active += change
    return end_s - last_s
