"""The driver: which unit runs next, where, and what is done when something fails.

It knows the goals and asks, again whenever something was lost, which units must run to reach them: those whose outputs
are neither in the work store nor on a worker's shelf. So a start, a resume after a kill, the loss of a worker and a
damaged file are the same thing. Nothing durable lives here.

Order. Of the units that can run, those with the lowest rank do, each where the least has to be moved to it. A unit with
a *home* runs where the home's first unit ran, because what it reads is there.

Faults. A worker that dies loses its shelf; its homes move, and what is missing is computed again from the last saved
hidden states. A unit that ran out of memory is cut into smaller ones, as how a job is cut changes no byte (``Tuning``);
so is one whose worker died ``SUSPECT_LOSSES`` times, as the system kills for memory without a word. A unit whose worker
died ``MAX_LOSSES`` times ends the job. A stored output that is gone or damaged is computed again.
A unit that takes far longer than units of its kind do is given to a second worker, to which the homes of the first
move; whoever is first wins. The first is given nothing more until it has told of everything that it was given.

Stopping. A job that is cancelled, or whose process is told to end, begins no more units. Those that run may end within
a bound, so that what they store is kept.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from pipeline.errors import GraphError, PipelineError
from pipeline.graph.dag import Kind, Stored, WorkUnit, open_needs, reachable_units, required_units
from pipeline.graph.executor import Executor, Finished, WorkerId, WorkerJoined, WorkerLost
from pipeline.graph.stages.call import KEPT_COPIES, LOST
from pipeline.graph.stopping import CANCELLED, cancelled
from pipeline.graph.tuning import Tuning
from pipeline.graph.worker import Outcome
from pipeline.storage.work import StageRecord

UNITS_AHEAD = 2
"""Units at a worker: one that runs and one that is ready when it ends."""

NEAR = 0.1
"""What moving a byte within a node costs, compared with moving it between nodes."""

AHEAD_S = 2.0
"""Longest unit, at the pace so far, that another one is queued behind: after a longer one the moment that it takes to
hand out the next does not count, and the next might run elsewhere before."""

SUSPECT_LOSSES = 2
"""Deaths of the worker that ran a unit, from which on the unit is cut smaller if it can be."""

MAX_LOSSES = 4
"""Deaths of the worker that ran a unit, after which the unit is taken to be their cause."""

MAX_RECOVERIES = 8
"""Times that a unit is tried again for the want of one output that was lost or damaged, after which what keeps or
carries it is taken to be at fault."""

STRAGGLER_FACTOR = 5.0
"""A unit that takes this many times as long as its cost and the pace so far say is started a second time."""

STRAGGLER_FLOOR_S = 20.0
"""Units are not taken for stragglers before they have run for so long."""

POLL_S = 1.0
"""Seconds between looks at what does not announce itself: a wish to cancel, stragglers."""

CANCELLED_S = 30.0
"""Longest wait for the units that run when a job is cancelled: more than a solve takes as jobs are cut."""

INTERRUPTED_S = 2.0
"""The same when a signal ends the process. `ray job stop` kills it 3 s later, others after 10 s or more."""

RECOVERABLE = frozenset({"storage.missing_stage", "storage.damaged_stage", LOST})
"""Codes of errors that are met by computing something again."""

_OUT_OF_MEMORY = "graph.out_of_memory"


StoredRecords = Mapping[Stored, StageRecord]
"""Stored outputs known to be there."""


class StageIndex(Protocol):
    """What the driver asks of a work store; see ``WorkStore``."""

    def lookup_all(self, places: Iterable[Stored]) -> dict[Stored, StageRecord]:
        """Return the records of those of many stages that are finished."""
        ...

    def discard(self, stage: str, key: str) -> None:
        """Forget a stage."""
        ...


class Observer:
    """Told what happens; the default says nothing."""

    def staffed(self, num_workers: int) -> None:
        """A worker has joined or was lost: so many take units now."""

    def planned(self, todo: Sequence[WorkUnit], present: Sequence[WorkUnit], records: StoredRecords) -> None:
        """The units that must run are known: at the start, and again whenever they changed.

        Args:
            todo: The units that must run.
            present: The units whose outputs are there, or only needed by such.
            records: What is known of stored outputs.
        """

    def finished(self, unit: WorkUnit, record: StageRecord | None, seconds: float, peak_bytes: int) -> None:
        """A unit ended well."""

    def recovered(self, reason: str) -> None:
        """Something was lost and is computed again."""


MakeGoals = Callable[[Tuning], Sequence[WorkUnit]]
"""Cuts a job into units."""


@dataclass
class _Run:
    """A unit on its way.

    Attributes:
        unit: The unit.
        workers: Who has it: one, or for a straggler more.
        began_s: When its turn came at the last of them; None while it waits behind others there.
        sources: Who held each of its needs in memory then.
    """

    unit: WorkUnit
    workers: list[WorkerId]
    began_s: float | None = None
    sources: dict[str, WorkerId] = field(default_factory=dict)


@dataclass
class _Pace:
    """Seconds per cost of units of a kind, so far."""

    seconds: float = 0.0
    cost: float = 0.0


@dataclass
class _State:
    """What the driver knows.

    Attributes:
        records: Stored outputs known to be there.
        holders: Which worker holds each passing output.
        origins: Which worker made each output, passing or stored.
        running: Units on their way, by key.
        queues: Keys of the units that each worker has, in order; those that were done elsewhere meanwhile included.
        overtaken: Of these, the keys of the units that were given to another worker since.
        homes: Which worker each home is at.
        losses: Workers that died under a unit, by its key.
        recoveries: Times that a unit failed for the want of an output, by the keys of both.
        planned: Keys of the units that had to run when it was last asked.
        waiting: For each unit that cannot run yet, the keys of the needs that are missing.
        dependents: For each missing need, the units that wait for it.
        ready: Units that can run, the most urgent first; of equally urgent ones that which could run first.
        readers: For each output, the keys of the units that will read it.
        chains: Homes of each chain.
        paces: How long units of a kind take.
    """

    records: dict[Stored, StageRecord] = field(default_factory=dict)
    holders: dict[str, WorkerId] = field(default_factory=dict)
    origins: dict[str, WorkerId] = field(default_factory=dict)
    running: dict[str, _Run] = field(default_factory=dict)
    queues: dict[WorkerId, list[str]] = field(default_factory=dict)
    overtaken: dict[WorkerId, set[str]] = field(default_factory=dict)
    homes: dict[str, WorkerId] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    recoveries: dict[tuple[str, str], int] = field(default_factory=dict)
    planned: set[str] = field(default_factory=set)
    waiting: dict[str, set[str]] = field(default_factory=dict)
    dependents: dict[str, list[WorkUnit]] = field(default_factory=dict)
    ready: list[WorkUnit] = field(default_factory=list)
    readers: dict[str, set[str]] = field(default_factory=dict)
    chains: dict[str, set[str]] = field(default_factory=dict)
    paces: dict[Kind, _Pace] = field(default_factory=dict)


class Driver:
    """Runs a job; see the top of this module."""

    def __init__(
        self,
        make_goals: MakeGoals,
        tuning: Tuning,
        work: StageIndex,
        executor: Executor,
        observer: Observer,
        *,
        is_cancelled: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to run what ``make_goals`` gives for ``tuning``."""
        self._make_goals, self._tuning = make_goals, tuning
        self._work, self._executor, self._observer = work, executor, observer
        self._is_cancelled, self._clock = is_cancelled, clock
        self._state = _State()
        self._goals: Sequence[WorkUnit] = ()
        self._looked_s = clock()

    def run(self) -> dict[str, StageRecord]:
        """Run what the goals need, and return the records of all durable goals by key.

        Raises:
            PipelineError: the first failure that nothing could be done about.
            GraphError: with the code ``graph.cancelled`` when the job was cancelled.
        """
        try:
            self._run_all()
        except KeyboardInterrupt:
            self._let_end(INTERRUPTED_S)
            raise
        except GraphError as error:
            if error.code == CANCELLED:
                self._let_end(CANCELLED_S)
            raise
        return {unit.key: self._state.records[unit.place] for unit in self._goals if unit.is_durable}

    def _run_all(self) -> None:
        self._replan()
        while self._state.waiting or self._state.ready or self._state.running:
            if self._is_cancelled():
                raise cancelled()
            self._dispatch()
            if not self._may_wait():
                raise self._stuck()
            match self._executor.wait(POLL_S):
                case Finished(worker, unit, outcome):
                    self._ended(worker, unit, outcome)
                case WorkerLost() as lost:
                    self._lost(lost)
                case WorkerJoined():
                    self._observer.staffed(len(self._executor.workers))
                case None:
                    pass
            if self._clock() - self._looked_s >= POLL_S:
                self._looked_s = self._clock()
                self._reissue_stragglers()

    def _let_end(self, timeout_s: float) -> None:
        """Wait for the units that run, and tell of those that ended well."""
        for event in self._executor.let_end(timeout_s):
            if self._state.running.pop(event.unit.key, None) is not None:
                outcome = event.outcome
                self._observer.finished(event.unit, outcome.record, outcome.seconds, outcome.peak_bytes)

    # What is to be done.

    def _replan(self) -> None:
        """Ask anew which units must run. Those that run already stay."""
        state = self._state
        self._goals = self._make_goals(self._tuning)
        self._ask_what_is_stored()
        todo = required_units(self._goals, self._is_there, self._is_stored)
        state.planned = {unit.key for unit in todo}
        state.readers, state.waiting, state.dependents, state.chains = {}, {}, {}, {}
        state.ready = []
        for unit in todo:
            for need in unit.needs:
                state.readers.setdefault(need.key, set()).add(unit.key)
            if unit.home:
                state.chains.setdefault(_chain(unit.home), set()).add(unit.home)
            if unit.key in state.running:
                continue
            missing = {need.key for need in open_needs(unit, self._is_there, self._is_stored)}
            missing |= state.planned.intersection(unit.after)
            if missing:
                state.waiting[unit.key] = missing
            else:
                self._is_ready(unit)
            for key in missing:
                state.dependents.setdefault(key, []).append(unit)
        present = [unit for unit in reachable_units(self._goals) if unit.key not in state.planned]
        self._observer.planned(todo, present, state.records)
        for key in [key for key in state.holders if key not in state.readers]:
            self._drop(key)

    def _is_there(self, unit: WorkUnit) -> bool:
        return self._is_stored(unit.place) if unit.is_durable else unit.key in self._state.holders

    def _is_stored(self, place: Stored) -> bool:
        return place in self._state.records

    def _ask_what_is_stored(self) -> None:
        """Learn of every place that a plan may look at, all at once: a store may be far away."""
        places = [
            place
            for unit in reachable_units(self._goals)
            for place in (*((unit.place,) if unit.is_durable else ()), *chain.from_iterable(unit.stand_ins.values()))
            if place not in self._state.records
        ]
        self._state.records |= self._work.lookup_all(places)

    def _is_ready(self, unit: WorkUnit) -> None:
        insort(self._state.ready, unit, key=lambda other: other.rank)

    def _take_ready(self, key: str) -> WorkUnit | None:
        """Return the unit with a key, which is ready no more; None when it was not."""
        ready = self._state.ready
        place = next((place for place, unit in enumerate(ready) if unit.key == key), None)
        return None if place is None else ready.pop(place)

    # Who does it.

    def _dispatch(self) -> None:
        """Give units to workers until each has enough or nothing is ready: the most urgent unit first, to the idlest
        worker that may run it, and of equally idle ones as ``_preference`` says."""
        ready, queues, overtaken = self._state.ready, self._state.queues, self._state.overtaken
        workers = [worker for worker in self._executor.workers if not overtaken.get(worker)]
        load = {worker: sum(map(self._load, queues.get(worker, ()))) for worker in workers}
        free = [worker for worker, units in load.items() if units < UNITS_AHEAD]
        homes = Counter(self._state.homes.values()) if free else Counter()
        place = 0
        while free and place < len(ready):
            unit = ready[place]
            may_run = self._may_run(unit, free, len(load))
            if not may_run:
                place += 1
                continue
            least = min(load[worker] for worker in may_run)
            idlest = [worker for worker in may_run if load[worker] == least]
            worker = min(idlest, key=self._preference(unit, homes)) if len(idlest) > 1 else idlest[0]
            ready.pop(place)
            if unit.home:
                homes[worker] += 1
                if (owner := self._state.homes.get(unit.home)) is not None:
                    homes[owner] -= 1
            self._start(unit, worker)
            load[worker] += self._load(unit.key)
            if load[worker] >= UNITS_AHEAD:
                free.remove(worker)

    def _load(self, key: str) -> int:
        """Return for how many units one counts at a worker. Behind a unit with a home nothing is queued: the one that
        comes after it there is more urgent, and can only be known when it has ended."""
        run = self._state.running.get(key)
        if run is None or run.unit.home or self._expected_s(run.unit) > AHEAD_S:
            return UNITS_AHEAD
        return 1

    def _may_run(self, unit: WorkUnit, workers: Sequence[WorkerId], num_workers: int) -> Sequence[WorkerId]:
        """Return which of some workers may run a unit: all, the one that its home is at, or those that have no more of
        its chain's homes than others have to. Who took more of them before others came leaves some to these."""
        if not unit.home:
            return workers
        owner = self._state.homes.get(unit.home)
        if owner is not None and owner in workers:
            return [owner]
        homes = self._state.chains.get(_chain(unit.home), {unit.home})
        own = Counter(self._state.homes.get(home) for home in homes)
        most = -(-len(homes) // num_workers)
        if owner is not None and own[owner] <= most:
            return []
        return [worker for worker in workers if own[worker] < most]

    def _preference(self, unit: WorkUnit, homes: Counter[WorkerId]) -> Callable[[WorkerId], tuple[float, ...]]:
        """Return what a worker for a unit is chosen by, the least first: how much has to be moved there, and how many
        homes it has, so that homes spread.

        What follows from a unit that opens a home moves more than itself, so homes spread over nodes. Those that start
        with nothing do not: they are spans of one text, and neighbours add up their sums.
        """
        node = self._executor.node
        if unit.home in self._state.homes or not unit.home or not unit.needs:
            return lambda worker: (self._bytes_to(worker, unit), homes[worker])
        at_node: Counter[str] = Counter()
        for worker, number in homes.items():
            at_node[node(worker)] += number
        return lambda worker: (at_node[node(worker)], homes[worker], self._bytes_to(worker, unit))

    def _bytes_to(self, worker: WorkerId, unit: WorkUnit) -> float:
        """Return how much would have to be moved to a worker for a unit. Within a node that is cheap, and what was
        stored by a worker of the node is in the node's memory."""
        total = 0.0
        for need in unit.needs:
            origin = self._state.origins.get(need.key)
            if origin is None or origin == worker:
                continue
            is_near = self._executor.node(origin) == self._executor.node(worker)
            total += need.out_bytes * (NEAR if is_near else 1.0)
        return total

    def _start(self, unit: WorkUnit, worker: WorkerId) -> None:
        state = self._state
        if unit.home:
            state.homes[unit.home] = worker
        run = state.running.setdefault(unit.key, _Run(unit, []))
        for slower in run.workers:
            state.overtaken.setdefault(slower, set()).add(unit.key)
        run.workers.append(worker)
        queue = state.queues.setdefault(worker, [])
        queue.append(unit.key)
        run.began_s = self._clock() if len(queue) == 1 else None
        run.sources = {need.key: holder for need in unit.needs if (holder := self._holder(need)) is not None}
        self._executor.submit(unit, worker, {key: holder for key, holder in run.sources.items() if holder != worker})

    def _holder(self, need: WorkUnit) -> WorkerId | None:
        """Return which worker has an output in memory, as far as is known: of stored ones it may have no copy left."""
        if not need.is_durable:
            return self._state.holders.get(need.key)
        origin = self._state.origins.get(need.key)
        return origin if need.kind in KEPT_COPIES and origin in self._executor.workers else None

    # What became of it.

    def _ended(self, worker: WorkerId, unit: WorkUnit, outcome: Outcome) -> None:
        self._take_off_queue(worker, unit)
        for stage in outcome.damaged:
            self._forget_record(Stored(stage.stage, stage.key))
            self._observer.recovered(f"{stage.stage} {stage.key[:12]} was damaged: {stage.reason}")
        if outcome.error is not None:
            self._failed(worker, unit, outcome.error)
        else:
            self._finished(worker, unit, outcome)
            if outcome.damaged:
                self._replan()

    def _take_off_queue(self, worker: WorkerId, unit: WorkUnit) -> None:
        """A worker is done with a unit, and comes to the next one that it has."""
        self._state.overtaken.get(worker, set()).discard(unit.key)
        queue = self._state.queues[worker]
        queue.remove(unit.key)
        run = self._state.running.get(queue[0]) if queue else None
        if run is not None and run.workers[-1] == worker and run.began_s is None:
            run.began_s = self._clock()

    def _finished(self, worker: WorkerId, unit: WorkUnit, outcome: Outcome) -> None:
        state = self._state
        if outcome.record is not None:
            state.records[unit.place] = outcome.record
        run = state.running.pop(unit.key, None)
        is_wanted = run or self._take_ready(unit.key) or state.waiting.pop(unit.key, None)
        if not is_wanted:  # a second worker was faster, and everything was told then
            if not unit.is_durable and state.holders.get(unit.key) != worker:
                self._executor.forget(worker, (unit.key,))
            return
        state.origins[unit.key] = worker
        if not unit.is_durable:
            state.holders[unit.key] = worker
            if not state.readers.get(unit.key):
                self._drop(unit.key)
        pace = state.paces.setdefault(unit.kind, _Pace())
        pace.seconds, pace.cost = pace.seconds + outcome.seconds, pace.cost + unit.cost
        self._observer.finished(unit, outcome.record, outcome.seconds, outcome.peak_bytes)
        for place in unit.obsoletes:
            self._work.discard(*place)
            self._forget_record(place)
        for need in unit.needs:
            self._read_once(need, unit)
        for dependent in state.dependents.pop(unit.key, []):
            missing = state.waiting.get(dependent.key, set())
            missing.discard(unit.key)
            if not missing and state.waiting.pop(dependent.key, None) is not None:
                self._is_ready(dependent)

    def _read_once(self, need: WorkUnit, reader: WorkUnit) -> None:
        readers = self._state.readers.get(need.key)
        if readers is not None and reader.key in readers:
            readers.remove(reader.key)
            if not readers:
                self._drop(need.key)
                self._drop_copy(need)

    def _drop(self, key: str) -> None:
        holder = self._state.holders.pop(key, None)
        if holder is not None and holder in self._executor.workers:
            self._executor.forget(holder, (key,))

    def _drop_copy(self, need: WorkUnit) -> None:
        """Nobody will read a stored output again in this job: whoever made it needs its copy no more."""
        origin = self._holder(need) if need.is_durable else None
        if origin is not None:
            self._executor.forget(origin, (need.key,))

    def _move_homes(self, worker: WorkerId) -> None:
        homes = self._state.homes
        for home in [home for home, owner in homes.items() if owner == worker]:
            del homes[home]

    def _failed(self, worker: WorkerId, unit: WorkUnit, error: PipelineError) -> None:
        state = self._state
        run = state.running.get(unit.key)
        if run is None or worker not in run.workers:
            return  # a second worker has done it, or does it
        run.workers.remove(worker)
        if error.code in RECOVERABLE:
            self._recover(run, error)
        elif run.workers:
            return
        elif error.code == _OUT_OF_MEMORY:
            self._cut_smaller(unit, error)
        else:
            raise error
        if not run.workers:
            del state.running[unit.key]
        self._replan()

    def _recover(self, run: _Run, error: PipelineError) -> None:
        """Believe no longer that what a unit did not find is there.

        Raises:
            PipelineError: when it failed for the want of the same output too often.
        """
        state, key = self._state, str(error.context.get("key", ""))
        tried = (run.unit.key, key)
        state.recoveries[tried] = state.recoveries.get(tried, 0) + 1
        if state.recoveries[tried] > MAX_RECOVERIES:
            raise error
        if "stage" in error.context:
            self._forget_record(Stored(str(error.context["stage"]), key))
        else:
            for place in run.unit.stand_ins.get(key, ()):
                self._forget_record(place)
            # Unless it was computed again since, and is at another worker now.
            if state.holders.get(key) == run.sources.get(key):
                self._drop(key)
        self._observer.recovered(error.message)

    def _forget_record(self, place: Stored) -> None:
        self._state.records.pop(place, None)

    def _cut_smaller(self, unit: WorkUnit, error: PipelineError) -> None:
        """Halve the units of a job that does not fit into its workers' memory.

        Raises:
            PipelineError: when they cannot be cut further.
        """
        if unit.key not in self._state.planned:
            return  # it was cut away already, on the word of another worker
        smaller = self._tuning.smaller()
        if self._keys(self._make_goals(smaller)) == self._keys(self._goals):
            raise GraphError(
                f"{error.message}; its units are as small as they can be",
                code="graph.out_of_memory",
                hint="run with fewer --workers on this machine, or on machines with more memory",
            ) from error
        self._tuning = smaller
        self._observer.recovered(f"{error.message}: units are cut smaller")

    def _cut_away(self, unit: WorkUnit) -> None:
        """Halve the units of a job if that leaves no unit as large as this one, which may be what kills its workers."""
        smaller = self._tuning.smaller()
        if unit.key in self._state.planned and unit.key not in self._keys(self._make_goals(smaller)):
            self._tuning = smaller
            self._observer.recovered(f"{unit.title} may need too much memory: units are cut smaller")

    @staticmethod
    def _keys(goals: Sequence[WorkUnit]) -> set[str]:
        return {unit.key for unit in reachable_units(goals)}

    def _lost(self, lost: WorkerLost) -> None:
        state = self._state
        state.queues.pop(lost.worker, None)
        state.overtaken.pop(lost.worker, None)
        for key in [key for key, holder in state.holders.items() if holder == lost.worker]:
            del state.holders[key]
        self._move_homes(lost.worker)
        for unit in lost.units:
            run = state.running.get(unit.key)
            if run is not None and lost.worker in run.workers:
                run.workers.remove(lost.worker)
                if not run.workers:
                    del state.running[unit.key]
        self._observer.recovered(f"worker {lost.worker} was lost ({lost.reason}); its work is done again")
        self._observer.staffed(len(self._executor.workers))
        if lost.units:
            # What was queued behind it is not to blame.
            blamed = lost.units[0]
            state.losses[blamed.key] = state.losses.get(blamed.key, 0) + 1
            if state.losses[blamed.key] >= MAX_LOSSES:
                raise GraphError(
                    f"{blamed.title} lost its worker {MAX_LOSSES} times: {lost.reason}",
                    code="graph.worker_lost",
                    hint="is the machine short of memory? run the same command with fewer --workers: it continues",
                )
            if lost.out_of_memory:
                self._cut_smaller(blamed, GraphError(f"{blamed.title} ran out of memory"))
            elif state.losses[blamed.key] >= SUSPECT_LOSSES:
                self._cut_away(blamed)
        self._replan()

    def _stuck(self) -> GraphError:
        state = self._state
        number = len(state.waiting) + len(state.ready)
        if not self._executor.workers:
            return GraphError(
                f"no worker is left, and {number} work units are to be done",
                code="graph.no_workers",
                hint="look at the cluster's nodes (ray status); the same command continues where this one stopped",
            )
        return GraphError(f"{number} work units wait for each other, and nothing runs")

    def _may_wait(self) -> bool:
        """Return whether anything can happen: a worker has something to do, or one is to come."""
        return any(self._state.queues.values()) or (not self._executor.workers and self._executor.is_expecting)

    def _reissue_stragglers(self) -> None:
        """Start units that take far too long once more, on workers that have nothing to do."""
        idle = [worker for worker in self._executor.workers if not self._state.queues.get(worker)]
        if not idle:
            return
        for run in list(self._state.running.values()):
            if idle and self._is_late(run):
                self._observer.recovered(f"{run.unit.title} takes long on {run.workers[-1]}: started again elsewhere")
                self._move_homes(run.workers[-1])
                self._start(run.unit, idle.pop())

    def _is_late(self, run: _Run) -> bool:
        """Return whether a unit takes far too long, or waits behind one that does."""
        if run.began_s is None:
            return bool(self._state.overtaken.get(run.workers[-1]))
        return self._clock() - run.began_s > max(STRAGGLER_FLOOR_S, STRAGGLER_FACTOR * self._expected_s(run.unit))

    def _expected_s(self, unit: WorkUnit) -> float:
        """Return how long a unit should take: at the pace of its kind, else of all kinds, else by its cost."""
        paces = self._state.paces
        known = [paces[unit.kind]] if unit.kind in paces else list(paces.values())
        seconds, cost = sum(pace.seconds for pace in known), sum(pace.cost for pace in known)
        return unit.cost * (seconds / cost if cost > 0 else 1.0)


def _chain(home: str) -> str:
    return home.partition(":")[0]
