"""What is done and what is left: the events of a job added up, and the time that the rest will take.

The estimate. Costs are comparable inside a phase only, so each phase learns its own rate from units that really ran
(reused ones are free): busy seconds per cost. A phase that has not run yet takes the mean rate of those that have.
Work units run side by side; how many at a time is what was measured, busy seconds over elapsed seconds. Then

    ETA = sum over phases of (cost left * rate) / (busy seconds / elapsed seconds)

is taken when a unit finishes and counted down until the next one does. Without measured seconds it is elapsed time
scaled by cost. Cost: a few additions per event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.observe.events import (
    Degraded,
    Event,
    Failed,
    JobStarted,
    Phase,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    Warned,
)


class VariantState(StrEnum):
    """How far a variant is."""

    WAITING = "waiting"
    QUANTIZING = "quantizing"
    EVALUATING = "evaluating"
    PASSED = "passed"
    FAILED = "failed"
    PUBLISHED = "published"


_WORKING = {
    Phase.SOLVE: VariantState.QUANTIZING,
    Phase.PACK: VariantState.QUANTIZING,
    Phase.EVALUATE: VariantState.EVALUATING,
}
_ENDED = {VariantState.PASSED, VariantState.FAILED, VariantState.PUBLISHED}
_ORDER = list(VariantState)


@dataclass
class PhaseTally:
    """One phase so far: units and cost planned and done, units reused, and the latest block."""

    phase: Phase
    num_units: int
    cost: float
    num_done: int = 0
    num_reused: int = 0
    cost_done: float = 0.0
    cost_fresh: float = 0.0
    busy_s: float = 0.0
    block: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every planned unit is done."""
        return self.num_done >= self.num_units

    @property
    def cost_left(self) -> float:
        """Cost of the units that are not done; never negative."""
        return 0.0 if self.is_complete else max(0.0, self.cost - self.cost_done)


@dataclass
class VariantTally:
    """One variant so far: latest block solved, latest loss, worst relative error, degradations, figures."""

    name: str
    state: VariantState = VariantState.WAITING
    block: int | None = None
    loss: float | None = None
    worst_relative_error: float | None = None
    num_degradations: int = 0
    figures: dict[str, float] = field(default_factory=dict)


class Tally:
    """The sum of a job's events.

    Args:
        started_s: Reading of the clock when the job began.
    """

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.job: JobStarted | None = None
        self.fetch: SourceAdvanced | None = None
        self.failure: Failed | None = None
        self.phases: dict[Phase, PhaseTally] = {}
        self.variants: dict[str, VariantTally] = {}
        self._estimate_s: float | None = None
        self._estimated_at_s = started_s

    def add(self, event: Event, now_s: float) -> None:
        """Take one event, at a reading of the clock."""
        match event:
            case SourceAdvanced():
                self.fetch = event
            case JobStarted():
                self.job, self.started_s = event, now_s
                self.phases = {work.phase: PhaseTally(work.phase, work.num_units, work.cost) for work in event.work}
                self.variants = {name: VariantTally(name) for name in event.variants}
            case StageFinished():
                self._add_stage(event)
                self._estimate_s, self._estimated_at_s = self._estimate(now_s - self.started_s), now_s
            case Degraded():
                self._variant(event.variant).num_degradations += 1
            case VariantJudged():
                variant = self._variant(event.variant)
                variant.state = VariantState.PASSED if event.passed else VariantState.FAILED
                variant.figures = event.figures
            case Published():
                self._variant(event.variant).state = VariantState.PUBLISHED
            case Failed():
                self.failure = event
            case Warned():
                pass

    @property
    def is_complete(self) -> bool:
        """Whether the planned work is done and every variant has been judged."""
        variants_ended = all(variant.state in _ENDED for variant in self.variants.values())
        return self.job is not None and variants_ended and all(phase.is_complete for phase in self.phases.values())

    def elapsed_s(self, now_s: float) -> float:
        """Seconds since the job started."""
        return max(0.0, now_s - self.started_s)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds until the planned work is done; None while nothing is known of its pace."""
        if self._estimate_s is None:
            return None
        return max(0.0, self._estimate_s - (now_s - self._estimated_at_s))

    def _variant(self, name: str) -> VariantTally:
        return self.variants.setdefault(name, VariantTally(name))

    def _add_stage(self, event: StageFinished) -> None:
        phase = self.phases.setdefault(event.phase, PhaseTally(event.phase, 0, 0.0))
        phase.num_done += 1
        phase.num_units = max(phase.num_units, phase.num_done)
        phase.cost_done += event.cost
        phase.block = event.block if event.block is not None else phase.block
        if event.reused:
            phase.num_reused += 1
        else:
            phase.cost_fresh += event.cost
            phase.busy_s += event.seconds
        if event.variant is not None:
            _advance(self._variant(event.variant), event)

    def _estimate(self, elapsed_s: float) -> float | None:
        fresh = sum(phase.cost_fresh for phase in self.phases.values())
        if fresh <= 0 or elapsed_s <= 0:
            return None
        busy_s = sum(phase.busy_s for phase in self.phases.values())
        if busy_s <= 0:
            return elapsed_s / fresh * sum(phase.cost_left for phase in self.phases.values())
        left_s = sum(
            phase.cost_left * (phase.busy_s / phase.cost_fresh if phase.cost_fresh > 0 else busy_s / fresh)
            for phase in self.phases.values()
        )
        return left_s * elapsed_s / busy_s


def _advance(variant: VariantTally, event: StageFinished) -> None:
    working = _WORKING.get(event.phase)
    # Blocks overlap: a variant shows the furthest state that any of its blocks has reached.
    if working is not None and _ORDER.index(working) > _ORDER.index(variant.state):
        variant.state = working
    if event.phase is Phase.SOLVE:
        variant.block = event.block if event.block is not None else variant.block
        variant.loss = event.loss if event.loss is not None else variant.loss
        if event.relative_error is not None:
            variant.worst_relative_error = max(variant.worst_relative_error or 0.0, event.relative_error)
