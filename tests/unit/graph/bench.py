"""A driver over scripted workers that run toy units: what its tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.driver import Driver, Observer
from pipeline.graph.executor import WorkerId
from pipeline.graph.stages.call import JobContext
from pipeline.graph.tuning import Tuning
from pipeline.storage.work import StageRecord
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.scripted_executor import Clock, Fault, ScriptedExecutor

TUNING = Tuning(spans=1, solve_s=1.0)


class Noted(Observer):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.reasons: list[str] = []

    def finished(self, unit: WorkUnit, record: StageRecord | None, seconds: float, peak_bytes: int) -> None:
        self.done.append(unit.label)

    def recovered(self, reason: str) -> None:
        self.reasons.append(reason)


class Bench:
    """A driver over scripted workers."""

    def __init__(
        self,
        folder: Path,
        goals: Sequence[WorkUnit],
        workers: int = 1,
        *,
        seed: int = 0,
        fault: Fault | None = None,
        make_goals: Callable[[Tuning], Sequence[WorkUnit]] | None = None,
        **options: Any,
    ) -> None:
        self.goals, self.clock, self.noted = goals, Clock(), Noted()
        self.work = DirectoryWorkStore(folder)
        context = JobContext(str(folder), "", "", (), "cpu", shelf_bytes=200)
        self.executor = ScriptedExecutor(context, workers, seed, fault)
        self.driver = Driver(
            make_goals or (lambda tuning: goals),
            TUNING,
            self.work,
            self.executor,
            self.noted,
            clock=self.clock,
            **options,
        )

    def run(self) -> dict[str, str]:
        """Run to the end and return what the goals came to."""
        return {key: record.summary["digest"] for key, record in self.driver.run().items()}

    def tick_when_idle(self) -> None:
        """Have the clock go on when all workers are stuck."""

        def tick(timeout_s: float) -> None:
            self.clock.now_s += timeout_s
            assert self.clock.now_s < 2000, "nobody does what is stuck"

        self.executor.on_idle = tick

    def ran(self) -> list[str]:
        return [done.label for _, done in self.executor.log]

    def ran_on(self, label: str) -> list[WorkerId]:
        return [name for name, done in self.executor.log if done.label == label]


def once(label: str, act: Callable[[ScriptedExecutor, WorkerId, WorkUnit], PipelineError | None]) -> Fault:
    """Return a fault that strikes when the unit of this label first comes to its turn."""
    struck: list[str] = []

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        if wanted.label == label and not struck:
            struck.append(name)
            return act(executor, name, wanted)
        return None

    return fault


def die(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
    executor.lose(name)
