"""What is done and what is left: the events of a job added up. How long the rest takes is ``pace.py``'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.observe.events import (
    Degraded,
    EngineNews,
    Event,
    Failed,
    JobRevised,
    JobStarted,
    Phase,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    Warned,
    WidthsChosen,
    WorkersReady,
    WorkersStarting,
)
from pipeline.observe.pace import Pace


class VariantState(StrEnum):
    """How far a variant is."""

    WAITING = "waiting"
    QUANTIZING = "quantizing"
    EVALUATING = "evaluating"
    PASSED = "passed"
    FAILED = "failed"
    PUBLISHED = "published"


_ENDED = {VariantState.PASSED, VariantState.FAILED, VariantState.PUBLISHED}


@dataclass
class PhaseTally:
    """One phase so far: units planned, done and reused, and the furthest block."""

    phase: Phase
    num_units: int
    num_done: int = 0
    num_reused: int = 0
    block: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every planned unit is done."""
        return self.num_done >= self.num_units


@dataclass
class VariantTally:
    """One variant so far: blocks packed, loss in the furthest one solved, worst relative error, degradations, figures.

    Blocks end in any order, and held-out text runs through the first while the last are solved, so a variant is
    evaluating only when all its blocks are packed.
    """

    name: str
    num_blocks: int = 0
    state: VariantState = VariantState.WAITING
    packed: set[int] = field(default_factory=set)
    furthest: int = -1
    loss: float | None = None
    worst_relative_error: float | None = None
    num_degradations: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether the gates have answered."""
        return self.state in _ENDED

    @property
    def num_packed(self) -> int:
        """Blocks that are packed: all when the gates have answered, also where another variant's were the same."""
        return self.num_blocks if self.has_ended else len(self.packed)

    def add(self, event: StageFinished) -> None:
        """Take a unit that worked for this variant."""
        if event.block is not None and event.block >= self.furthest and event.loss is not None:
            self.furthest, self.loss = event.block, event.loss
        if event.relative_error is not None:
            self.worst_relative_error = max(self.worst_relative_error or 0.0, event.relative_error)
        if event.phase is Phase.PACK and event.block is not None:
            self.packed.add(event.block)
        if not self.has_ended:
            is_packed = len(self.packed) >= self.num_blocks
            self.state = VariantState.EVALUATING if is_packed else VariantState.QUANTIZING


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
        self.num_workers = 0
        self.num_workers_wanted = 0
        self.phases: dict[Phase, PhaseTally] = {}
        self.variants: dict[str, VariantTally] = {}
        self._pace = Pace(())

    def add(self, event: Event, now_s: float) -> None:
        """Take one event, at a reading of the clock."""
        match event:
            case SourceAdvanced():
                self.fetch = event
            case WorkersStarting():
                self.num_workers_wanted = event.num_wanted
            case WorkersReady():
                self.num_workers, self.num_workers_wanted = event.num_ready, event.num_wanted
                self._pace.staff(event.num_ready, now_s)
            case JobStarted():
                self.job = event
                self.phases = {work.phase: PhaseTally(work.phase, work.num_units) for work in event.work}
                self.variants = {name: VariantTally(name, event.num_blocks) for name in event.variants}
                self._pace = Pace(event.work)
                self._pace.staff(self.num_workers, now_s)
            case JobRevised():
                for work in event.left:
                    phase = self.phases.setdefault(work.phase, PhaseTally(work.phase, 0))
                    phase.num_units = phase.num_done + work.num_units
                self._pace.revise(event.left)
            case StageFinished():
                self._add_stage(event)
                self._pace.add(event, now_s)
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
            case Warned() | WidthsChosen() | EngineNews():
                pass

    @property
    def is_complete(self) -> bool:
        """Whether the planned work is done and every variant has been judged."""
        variants_ended = all(variant.has_ended for variant in self.variants.values())
        return self.job is not None and variants_ended and all(phase.is_complete for phase in self.phases.values())

    def elapsed_s(self, now_s: float) -> float:
        """Seconds since the tally began."""
        return max(0.0, now_s - self.started_s)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds until the planned work is done; None while too little is known of its pace."""
        return self._pace.left_s(now_s)

    def _variant(self, name: str) -> VariantTally:
        return self.variants.setdefault(name, VariantTally(name))

    def _add_stage(self, event: StageFinished) -> None:
        phase = self.phases.setdefault(event.phase, PhaseTally(event.phase, 0))
        phase.num_done += 1
        phase.num_units = max(phase.num_units, phase.num_done)
        phase.num_reused += event.reused
        if event.block is not None:
            phase.block = max(phase.block or 0, event.block)
        if event.variant is not None:
            self._variant(event.variant).add(event)
