"""How a simulated conversion went: its time, what its end waited for, and what moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.executor import WorkerId
from pipeline.graph.traffic import Route


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
    Kind.COMPARE: Limit.FORWARD,
    Kind.PROPAGATE: Limit.FORWARD,
    Kind.FORWARD: Limit.FORWARD,
    Kind.ADD: Limit.REDUCTION,
    Kind.MERGE: Limit.REDUCTION,
    Kind.COMPENSATE: Limit.SOLVES,
    Kind.FACTOR: Limit.SOLVES,
    Kind.SENSE: Limit.FORWARD,
    Kind.APPRAISE: Limit.SOLVES,
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
        workers: Workers of each; where they differ, of the one that has most.
        uneven: Workers of each machine where they differ; empty where they do not.
    """

    nodes: int
    workers: int
    uneven: tuple[int, ...] = ()

    @classmethod
    def of(cls, by_node: Sequence[int]) -> Cluster:
        """Return machines with these numbers of workers; those without any do not count."""
        found = tuple(sorted(filter(None, by_node), reverse=True))
        return cls(len(found), found[0], found if found[-1] != found[0] else ())

    @property
    def by_node(self) -> tuple[int, ...]:
        """Workers of each machine."""
        return self.uneven or (self.workers,) * self.nodes

    @property
    def num_workers(self) -> int:
        """Workers of all nodes."""
        return sum(self.by_node)

    @property
    def words(self) -> str:
        """The machines and their workers in words."""
        if not self.uneven:
            return f"{self.nodes} x {self.workers} workers"
        return f"{self.nodes} machines with {', '.join(map(str, self.uneven))} workers"


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
class Stage:
    """How all units of a kind would go.

    Attributes:
        kind: Of the units.
        num_units: How many.
        compute_s: Seconds for which workers compute them, over all workers.
        begin_s: When the first one has its turn.
        end_s: When the output of the last one is there.
        moved_bytes: Bytes by how they went.
    """

    kind: Kind
    num_units: int
    compute_s: float
    begin_s: float
    end_s: float
    moved_bytes: Mapping[str, float]


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
        stages: What each kind of unit takes and moves, in the order in which they begin.
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
    stages: tuple[Stage, ...]
    held_bytes: float
    busy_links: Mapping[str, float]

    @property
    def busy_share(self) -> float:
        """The workers' mean share of busy time."""
        return sum(self.busy_shares) / len(self.busy_shares)

    def moved_bytes(self, route: str) -> float:
        """Return the bytes that all stages move one way."""
        return sum(stage.moved_bytes.get(route, 0.0) for stage in self.stages)


def stages_of(ran: Iterable[Ran], moved: Mapping[tuple[Kind, Route], float]) -> tuple[Stage, ...]:
    """Return what each kind of unit took, in the order in which they begin.

    Args:
        ran: Units that ran.
        moved: Bytes by kind and how they went.
    """
    by_kind: dict[Kind, list[Ran]] = {}
    for one in ran:
        by_kind.setdefault(one.unit.kind, []).append(one)
    stages = [
        Stage(
            kind=kind,
            num_units=len(own),
            compute_s=sum(one.unit.cost for one in own),
            begin_s=min(one.begin_s for one in own),
            end_s=max(one.end_s for one in own),
            moved_bytes={route.value: num_bytes for (other, route), num_bytes in moved.items() if other is kind},
        )
        for kind, own in by_kind.items()
    ]
    return tuple(sorted(stages, key=lambda stage: (stage.begin_s, stage.kind)))


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
