"""Where units run, as the driver sees it: workers that take units and report what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.graph.dag import WorkUnit
from pipeline.graph.worker import Outcome, Worker, nobody_holds

WorkerId = str


@dataclass(frozen=True)
class Finished:
    """A unit ended on a worker, well or not."""

    worker: WorkerId
    unit: WorkUnit
    outcome: Outcome


@dataclass(frozen=True)
class WorkerLost:
    """A worker is gone, with all that it held.

    Attributes:
        worker: Which.
        units: What it was running or had queued, the running one first.
        reason: What is known of why.
        out_of_memory: Whether it was killed for its memory.
    """

    worker: WorkerId
    units: tuple[WorkUnit, ...]
    reason: str
    out_of_memory: bool = False


@dataclass(frozen=True)
class WorkerJoined:
    """A worker is there and takes units."""

    worker: WorkerId


Event = Finished | WorkerLost | WorkerJoined


class Executor(Protocol):
    """Runs work units somewhere."""

    @property
    def workers(self) -> Sequence[WorkerId]:
        """The workers that take units now."""
        ...

    def node(self, worker: WorkerId) -> str:
        """Return which machine a worker is on; empty for one that is gone."""
        ...

    @property
    def is_expecting(self) -> bool:
        """Whether a worker is to join, so that it pays to wait when there is none."""
        ...

    def submit(self, unit: WorkUnit, worker: WorkerId, holders: Mapping[str, WorkerId]) -> None:
        """Queue a unit at a worker.

        Args:
            unit: What to run.
            worker: Where.
            holders: Which other worker holds each passing output that the unit reads and its own worker lacks.
        """
        ...

    def wait(self, timeout_s: float) -> Event | None:
        """Return what happened next, or None when nothing did in time."""
        ...

    def forget(self, worker: WorkerId, keys: Iterable[str]) -> None:
        """Have a worker drop passing outputs that nobody reads any more."""
        ...

    def let_end(self, timeout_s: float) -> Sequence[Finished]:
        """Wait for the units that run, so long at most, and begin none that is queued; return those that ended well."""
        ...

    def close(self) -> None:
        """Stop what is running and let go of the workers."""
        ...


class InlineExecutor:
    """One worker in this process, which runs a unit when it is waited for: the reference that Ray is compared with."""

    NAME = "inline"
    is_expecting = False

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._queue: list[WorkUnit] = []

    @property
    def workers(self) -> Sequence[WorkerId]:
        """The one worker."""
        return (self.NAME,)

    def node(self, worker: WorkerId) -> str:
        """This machine."""
        return "here"

    def submit(self, unit: WorkUnit, worker: WorkerId, holders: Mapping[str, WorkerId]) -> None:
        """Queue a unit."""
        self._queue.append(unit)

    def wait(self, timeout_s: float) -> Event | None:
        """Run the oldest queued unit."""
        if not self._queue:
            return None
        unit = self._queue.pop(0)
        return Finished(self.NAME, unit, self._worker.run(unit, nobody_holds))

    def forget(self, worker: WorkerId, keys: Iterable[str]) -> None:
        """Drop passing outputs."""
        self._worker.forget(keys)

    def let_end(self, timeout_s: float) -> Sequence[Finished]:
        """Nothing runs while nobody waits for it."""
        return ()

    def close(self) -> None:
        """Remove what was spilled."""
        self._worker.close()
