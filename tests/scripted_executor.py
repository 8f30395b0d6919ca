"""Several real workers in one process, run one unit at a time, with every fault of a cluster to order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.errors import PipelineError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.executor import Event, Finished, WorkerId, WorkerJoined, WorkerLost
from pipeline.graph.parts import join_parts
from pipeline.graph.shelf import Tensors
from pipeline.graph.stages.call import JobContext
from pipeline.graph.worker import Outcome, Worker, lost_output

Fault = Callable[["ScriptedExecutor", WorkerId, WorkUnit], "PipelineError | None"]
"""Asked before a unit runs: may do what it likes to the executor and the work store, and may give an error that the
unit ends with instead of running."""


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _nobody_acts(timeout_s: float) -> None:
    raise AssertionError("the driver waits for workers that will never answer")


class ScriptedExecutor:
    """Runs units on real workers over one work store, in an order that a seed decides.

    Attributes:
        alive: The workers that take units.
        log: What ran to its end, and where, in order.
        submitted: Every unit that was ever submitted, by key.
        stalled: Workers that take units and never run them.
        is_expecting: Whether a worker is to join, as the driver is told.
        begun: Workers whose first unit runs when the job is stopped.
        on_idle: Called when nothing can run, with the seconds that the driver would wait.
    """

    def __init__(self, context: JobContext, num_workers: int, seed: int = 0, fault: Fault | None = None) -> None:
        self.context, self.random = context, random.Random(seed)
        self.alive: dict[WorkerId, Worker] = {}
        self.log: list[tuple[WorkerId, WorkUnit]] = []
        self.submitted: dict[str, WorkUnit] = {}
        self.stalled: set[WorkerId] = set()
        self.begun: set[WorkerId] = set()
        self.is_expecting = False
        self._fault = fault
        self._queues: dict[WorkerId, list[tuple[WorkUnit, Mapping[str, WorkerId]]]] = {}
        self._events: deque[Event] = deque()
        self._number = 0
        self.on_idle: Callable[[float], None] = _nobody_acts
        for _ in range(num_workers):
            self.join()
        self._events.clear()

    @property
    def workers(self) -> Sequence[WorkerId]:
        """The workers; one that died is among them until its loss was told, as nobody knows before."""
        return list(self._queues)

    def node(self, worker: WorkerId) -> str:
        """Return which machine a worker is on: there are two on each."""
        return f"machine-{int(worker[1:]) // 2}" if worker in self.alive else ""

    def submit(self, unit: WorkUnit, worker: WorkerId, holders: Mapping[str, WorkerId]) -> None:
        """Queue a unit at a worker."""
        assert len(self._queues[worker]) < 8, "nobody needs so many units ahead"
        self.submitted[unit.key] = unit
        self._queues[worker].append((unit, dict(holders)))

    def wait(self, timeout_s: float) -> Event | None:
        """Run a unit of a worker that the seed picks."""
        if not self._events:
            able = [name for name in self.alive if self._queues[name] and name not in self.stalled]
            if able:
                return self.step(self.random.choice(able))
            self.on_idle(timeout_s)
        return self._next_event()

    def _next_event(self) -> Event | None:
        event = self._events.popleft() if self._events else None
        if isinstance(event, WorkerLost):
            queue = self._queues.pop(event.worker)
            return replace(event, units=tuple(unit for unit, _ in queue))
        return event

    def step(self, name: WorkerId) -> Event | None:
        """Run what a worker has first in its queue."""
        unit, holders = self._queues[name][0]
        error = self._fault(self, name, unit) if self._fault else None
        if name not in self.alive or name in self.stalled:
            return self._next_event()
        if error is not None:
            self._queues[name].pop(0)
            return Finished(name, unit, Outcome(None, error, 0.0, 0))
        outcome = self.run(name, unit, holders)
        self._queues[name].pop(0)
        if outcome.error is None:
            self.log.append((name, unit))
        return Finished(name, unit, outcome)

    def step_now(self, name: WorkerId) -> None:
        """Run what a worker has first in its queue before anything else happens."""
        event = self.step(name)
        assert event is not None
        self._events.append(event)

    def run(self, name: WorkerId, unit: WorkUnit, holders: Mapping[str, WorkerId]) -> Outcome:
        """Run a unit on a worker, whoever waits for it."""

        def fetch(key: str, prefix: str) -> Tensors:
            holder = self.alive.get(holders.get(key, ""))
            if holder is None or holders[key] in self.stalled:
                raise lost_output(key)
            return join_parts(lambda number: holder.hand_over(key, prefix, number))

        return self.alive[name].run(unit, fetch)

    def forget(self, worker: WorkerId, keys: Iterable[str]) -> None:
        """Drop passing outputs."""
        if worker in self.alive:
            self.alive[worker].forget(keys)

    def let_end(self, timeout_s: float) -> Sequence[Finished]:
        """Run the units that have begun."""
        events = [self.step(name) for name in sorted(self.begun) if self._queues[name]]
        return [event for event in events if isinstance(event, Finished) and event.outcome.error is None]

    def close(self) -> None:
        """Remove what was spilled."""
        for worker in self.alive.values():
            worker.close()

    def lose(self, name: WorkerId, *, out_of_memory: bool = False, after_work: bool = False) -> None:
        """A worker dies: with ``after_work`` when its first unit is done but nobody was told."""
        if after_work and self._queues[name]:
            self.run(name, *self._queues[name][0])
        self.alive.pop(name).close()
        self.stalled.discard(name)
        self._events.append(WorkerLost(name, (), "killed by the test", out_of_memory))

    def join(self) -> WorkerId:
        """A new worker is there."""
        self._number += 1
        name = f"w{self._number}"
        self.alive[name], self._queues[name] = Worker(self.context), []
        self._events.append(WorkerJoined(name))
        return name

    def queued(self, name: WorkerId) -> list[str]:
        """Return the labels of the units that a worker has."""
        return [unit.label for unit, _ in self._queues[name]]

    def held(self) -> set[str]:
        """Return the keys of passing outputs that are still on a shelf, of all that were ever submitted."""
        passing = [key for key, unit in self.submitted.items() if not unit.is_durable]
        return {key for key in passing for worker in self.alive.values() if worker.shelf.get(key) is not None}
