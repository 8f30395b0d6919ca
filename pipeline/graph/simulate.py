"""A conversion on a cluster that is not there: the real units and the real driver, on a virtual clock.

``SimulatedExecutor`` stands where Ray does. A unit takes its cost, and no less than its bytes need on their way:

- The source's weights and stored outputs come and go through one link of each node; what a node has read or written
  stays in its memory for its other workers. Reads of a queued unit go on while the unit before it runs, and a block's
  weights are read ahead while hidden states pass the block before.
- Weights that continuations pass by stay with a worker as far as its memory goes, and are taken in again where they
  did not.
- Passing outputs that another worker holds come directly within a node, and between nodes through the receiver's and
  the sender's network link. They are fetched when the unit's turn has come.
- A link carries one thing after the other, in the order in which they were asked for.

What comes out is the schedule that would run, as far as costs and rates are right. What is left out: the driver's own
time, the start of workers, faults, and memory that runs short (``Prediction.held_bytes`` says how much would be held).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.graph.build import UnitInputs, build_units
from pipeline.graph.continuations import LOAD
from pipeline.graph.cost import CostModel, cost_model
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.driver import Driver, Observer
from pipeline.graph.executor import Event, Finished, WorkerId
from pipeline.graph.prediction import Cluster, Limit, Prediction, Ran, critical_waits, stages_of, tail_seconds
from pipeline.graph.traffic import Read, Route, Traffic
from pipeline.graph.tuning import Tuning, make_tuning
from pipeline.graph.worker import Outcome
from pipeline.storage.work import StageRecord

SMALL_S = 0.01
"""What a link carries in less time does not wait for larger things before it: links are shared."""


class Link:
    """Something that carries bytes, one thing after the other; small ones in between.

    Attributes:
        busy_s: Seconds for which it carried something.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self.busy_s = 0.0

    def carry(self, now_s: float, num_bytes: float) -> float:
        """Return when bytes asked for now have passed."""
        seconds = num_bytes / self._bytes_per_s
        self.busy_s += seconds
        self._free_s = max(self._free_s, now_s) + seconds
        return self._free_s if seconds > SMALL_S else now_s + seconds


class _Node:
    """A machine: its links, and when what it has read or written was there."""

    def __init__(self, name: str, model: CostModel) -> None:
        self.name = name
        self.store = Link(model.rates.store_bytes)
        self.inward, self.outward = Link(model.rates.network_bytes), Link(model.rates.network_bytes)
        self.has: dict[str, float] = {}


@dataclass
class _Ticket:
    """A unit at a worker.

    Attributes:
        unit: What to do.
        holders: Who holds the passing outputs that it reads and the worker lacks.
        read_s: When its reads are there.
        read_limit: What they are waited for.
        cause: The unit whose end had it submitted; empty for none.
    """

    unit: WorkUnit
    holders: Mapping[str, WorkerId]
    read_s: float
    read_limit: Limit
    cause: str


@dataclass
class _Seat:
    """A worker."""

    node: _Node
    queue: deque[_Ticket] = field(default_factory=deque)
    last: str = ""
    busy_s: float = 0.0
    resident: OrderedDict[str, float] = field(default_factory=OrderedDict)
    held: dict[str, float] = field(default_factory=dict)
    held_bytes: float = 0.0
    peak_bytes: float = 0.0


class SimulatedExecutor:
    """Workers on a virtual clock.

    Attributes:
        is_expecting: All workers are there from the start.
        now_s: The time.
        ran: Units that ran, by key, in the order in which they ended.
        moved: Bytes by the kind of the unit that moved them and how they went.
    """

    is_expecting = False

    def __init__(self, cluster: Cluster, model: CostModel, traffic: Traffic) -> None:
        """Start with idle workers, those of a node one after the other."""
        self._model, self._traffic = model, traffic
        self._nodes = [_Node(f"node-{number}", model) for number in range(cluster.nodes)]
        self._seats = {
            f"{node.name}-worker-{place}": _Seat(node)
            for node, workers in zip(self._nodes, cluster.by_node, strict=True)
            for place in range(workers)
        }
        self._names = tuple(self._seats)
        self._ends: list[tuple[float, int, WorkerId, Ran]] = []
        self._number = 0
        self._last_ended = ""
        self.now_s = 0.0
        self.ran: dict[str, Ran] = {}
        self.moved: dict[tuple[Kind, Route], float] = {}

    @property
    def workers(self) -> Sequence[WorkerId]:
        """All workers."""
        return self._names

    def node(self, worker: WorkerId) -> str:
        """Return which machine a worker is on."""
        return self._seats[worker].node.name

    def submit(self, unit: WorkUnit, worker: WorkerId, holders: Mapping[str, WorkerId]) -> None:
        """Queue a unit; what it reads starts to come."""
        seat = self._seats[worker]
        read_s, limit = self._read(unit, self._traffic.reads(unit, holders), seat.node)
        seat.queue.append(_Ticket(unit, holders, read_s, limit, self._last_ended))
        if len(seat.queue) == 1:
            self._begin(worker, seat)

    def wait(self, timeout_s: float) -> Event | None:
        """Go to the time at which the next unit ends."""
        if not self._ends:
            return None
        self.now_s, _, worker, ran = heapq.heappop(self._ends)
        seat, unit = self._seats[worker], ran.unit
        seat.queue.popleft()
        seat.last = self._last_ended = unit.key
        self.ran[unit.key] = ran
        if not unit.is_durable:
            seat.held[unit.key] = unit.out_bytes
            seat.held_bytes += unit.out_bytes
            seat.peak_bytes = max(seat.peak_bytes, seat.held_bytes)
        if seat.queue:
            self._begin(worker, seat)
        record = StageRecord(stage=unit.kind.value, key=unit.key, files={}, summary={}) if unit.is_durable else None
        return Finished(worker, unit, Outcome(record, None, ran.end_s - ran.begin_s, 0))

    def forget(self, worker: WorkerId, keys: Iterable[str]) -> None:
        """Have a worker drop passing outputs."""
        seat = self._seats[worker]
        for key in keys:
            seat.held_bytes -= seat.held.pop(key, 0.0)

    def let_end(self, timeout_s: float) -> Sequence[Finished]:
        """Nobody stops a simulation."""
        return ()

    def close(self) -> None:
        """Nothing is to be let go of."""

    def _read(self, unit: WorkUnit, reads: Iterable[Read], node: _Node) -> tuple[float, Limit]:
        """Ask for weights and stored outputs that the node has not; return when all are there, and what is last."""
        last_s, limit = self.now_s, Limit.STORE
        for read in reads:
            there_s = node.has.get(read.name, node.has.get(read.whole))
            if there_s is None:
                there_s = node.has[read.name] = node.store.carry(self.now_s, read.num_bytes)
                self._count(unit, read.route, read.num_bytes)
            if there_s > last_s:
                last_s, limit = there_s, Limit.WEIGHTS if read.route is Route.WEIGHTS else Limit.STORE
        return last_s, limit

    def _begin(self, worker: WorkerId, seat: _Seat) -> None:
        """Let the first unit of a worker's queue have its turn, and note when it will end."""
        ticket = seat.queue[0]
        unit, rates = ticket.unit, self._model.rates
        fetched_s = self._fetch(ticket, seat)
        self._read(unit, self._traffic.ahead(unit), seat.node)
        taken_s = self._take_in(unit, seat) / rates.weight_bytes
        compute_s = max(self.now_s, ticket.read_s, fetched_s) + taken_s
        # A unit that does nothing else has it in its cost.
        computes_s = max(0.0, unit.cost - taken_s) if unit.params.get("step") == LOAD else unit.cost
        end_s = computed_s = compute_s + computes_s
        if written := self._traffic.written_bytes(unit):
            self._count(unit, Route.WRITTEN, written)
            carried_s = seat.node.store.carry(self.now_s, written)
            end_s = max(computed_s, carried_s, compute_s + written / rates.store_bytes)
            if unit.is_durable:
                seat.node.has[unit.key] = end_s
        seat.busy_s += unit.cost
        waited_for = Limit.NETWORK if fetched_s >= ticket.read_s else ticket.read_limit
        if taken_s > max(fetched_s, ticket.read_s) - self.now_s:
            waited_for = Limit.WEIGHTS
        ran = Ran(unit, worker, self.now_s, compute_s, computed_s, end_s, waited_for, (ticket.cause, seat.last))
        self._number += 1
        heapq.heappush(self._ends, (end_s, self._number, worker, ran))

    def _take_in(self, unit: WorkUnit, seat: _Seat) -> float:
        """Return the bytes of weights that a worker takes in for a continuation: none of those that it has still."""
        name, num_weights = self._traffic.resident(unit)
        num_bytes = self._model.rates.weight_size * num_weights
        if name in seat.resident:
            seat.resident.move_to_end(name)
            return 0.0
        if num_bytes:
            seat.resident[name] = num_bytes
            while sum(seat.resident.values()) > self._model.rates.resident_bytes and len(seat.resident) > 1:
                seat.resident.popitem(last=False)
        return num_bytes

    def _fetch(self, ticket: _Ticket, seat: _Seat) -> float:
        """Ask other workers for what they hold; return when all of it is here."""
        done_s = self.now_s
        needs = {need.key: need for need in ticket.unit.needs}
        for key, holder in ticket.holders.items():
            num_bytes = self._traffic.fetched_bytes(ticket.unit, needs[key])
            other = self._seats[holder].node
            if other is seat.node:
                done_s += num_bytes / self._model.rates.peer_bytes
                self._count(ticket.unit, Route.PEER, num_bytes)
            else:
                sent_s = other.outward.carry(self.now_s, num_bytes)
                done_s = max(done_s, sent_s, seat.node.inward.carry(self.now_s, num_bytes))
                self._count(ticket.unit, Route.NETWORK, num_bytes)
        return done_s

    def _count(self, unit: WorkUnit, route: Route, num_bytes: float) -> None:
        place = (unit.kind, route)
        self.moved[place] = self.moved.get(place, 0.0) + num_bytes

    def prediction(self, cluster: Cluster) -> Prediction:
        """Return how everything went that ran so far."""
        seconds = self.now_s
        waits = critical_waits(self.ran)
        links = {
            "store": max(node.store.busy_s for node in self._nodes),
            "into a node": max(node.inward.busy_s for node in self._nodes),
            "out of a node": max(node.outward.busy_s for node in self._nodes),
        }
        return Prediction(
            cluster=cluster,
            hardware=self._model.rates.hardware,
            seconds=seconds,
            num_units=len(self.ran),
            busy_shares=tuple(seat.busy_s / seconds for seat in self._seats.values()),
            bottleneck=max(waits, key=lambda limit: waits[limit]).value,
            waits={limit.value: waits[limit] for limit in sorted(waits, key=lambda limit: -waits[limit])},
            tail_s=tail_seconds(self.ran.values(), cluster.num_workers, seconds),
            stages=stages_of(self.ran.values(), self.moved),
            held_bytes=max(seat.peak_bytes for seat in self._seats.values()),
            busy_links={name: busy_s / seconds for name, busy_s in links.items()},
        )


class EmptyStore:
    """Stands in for a work store that holds nothing but what the driver was told of."""

    def lookup_all(self, places: Iterable[Stored]) -> dict[Stored, StageRecord]:
        """Nothing is there from earlier runs."""
        return {}

    def discard(self, stage: str, key: str) -> None:
        """Nothing is kept."""


def simulate(
    inputs: UnitInputs, cluster: Cluster, model: CostModel | None = None, tuning: Tuning | None = None
) -> Prediction:
    """Return how a conversion would go on a cluster whose work store is empty.

    Args:
        inputs: What to convert.
        cluster: Where.
        model: Costs and rates (default: those of the job's device).
        tuning: How it is cut (default: as is soonest done).
    """
    costs = model or cost_model(inputs.device, inputs.spec.precision)
    executor = SimulatedExecutor(cluster, costs, Traffic(inputs.outline))
    driver = Driver(
        lambda cut: build_units(inputs, cut, costs).goals,
        tuning or make_tuning(inputs.outline, inputs.spec, cluster.num_workers, costs),
        EmptyStore(),
        executor,
        Observer(),
        clock=lambda: executor.now_s,
    )
    driver.run()
    return executor.prediction(cluster)
