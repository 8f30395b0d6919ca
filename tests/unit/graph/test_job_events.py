"""What a job tells of itself: a fresh run, one that goes on after an interruption, one that finds everything done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.graph.convert import RunOptions, VariantOutcome, convert
from pipeline.observe.events import (
    ClosingSink,
    Event,
    JobStarted,
    Phase,
    StageFinished,
    WorkersReady,
    WorkersStarting,
)
from pipeline.observe.tally import Tally, VariantState
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec
from tests.factories import OPEN_GATES

MakeSpec = Callable[..., ConversionSpec]
VARIANTS = {"gptq-w4-g64", "awq-w4-g64"}


class Heard(ClosingSink):
    """Keeps every event and what they add up to; interrupts the job after some units."""

    def __init__(self, interrupt_after: float = math.inf) -> None:
        self.events: list[Event] = []
        self.tally = Tally(0.0)
        self._interrupt_after = interrupt_after

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.tally.add(event, float(len(self.events)))
        if len(self.units) >= self._interrupt_after:
            raise KeyboardInterrupt

    @property
    def units(self) -> list[StageFinished]:
        return [event for event in self.events if isinstance(event, StageFinished)]

    @property
    def job(self) -> JobStarted:
        (job,) = [event for event in self.events if isinstance(event, JobStarted)]
        return job

    @property
    def workers(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, WorkersStarting | WorkersReady)]


def run(spec: ConversionSpec, settings: Settings, work_dir: Path, heard: Heard) -> tuple[VariantOutcome, ...]:
    return convert(spec, settings, RunOptions(work_dir, workers=2, inline=True), heard)


def require_all_told(heard: Heard, outcomes: tuple[VariantOutcome, ...]) -> None:
    """Everything that was announced was told, and every variant's row is full."""
    told = Counter(unit.phase for unit in heard.units)
    costs = {phase: math.fsum(unit.cost for unit in heard.units if unit.phase is phase) for phase in Phase}
    for work in heard.job.work:
        assert told[work.phase] == work.num_units
        assert costs[work.phase] == pytest.approx(work.cost)
    assert heard.tally.is_complete
    for outcome in outcomes:
        row = heard.tally.variants[outcome.facts.variant.name]
        assert (row.num_packed, row.state) == (2, VariantState.PUBLISHED)
        assert row.worst_relative_error == pytest.approx(max(m.relative_error for m in outcome.facts.modules))


def test_a_run_tells_of_its_workers_before_the_job_and_of_every_unit_after(
    make_spec: MakeSpec, settings: Settings, tmp_path: Path
) -> None:
    heard = Heard()
    outcomes = run(make_spec(gates=OPEN_GATES), settings, tmp_path / "work", heard)
    assert heard.workers == [WorkersStarting(1), WorkersReady(1, 1)]
    assert heard.events.index(heard.job) == heard.events.index(WorkersReady(1, 1)) + 1
    assert {work.phase for work in heard.job.work} == set(Phase)
    assert {unit.variant for unit in heard.units} == {*VARIANTS, None}
    assert not any(unit.reused for unit in heard.units)
    require_all_told(heard, outcomes)


def test_a_run_after_an_interruption_tells_what_is_reused_first(
    make_spec: MakeSpec, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(make_spec(gates=OPEN_GATES), settings, tmp_path / "work", Heard(interrupt_after=30))
    heard = Heard()
    outcomes = run(make_spec(gates=OPEN_GATES), settings, tmp_path / "work", heard)
    is_reused = [unit.reused for unit in heard.units]
    assert any(is_reused)
    assert is_reused == sorted(is_reused, reverse=True)
    assert not all(is_reused)
    require_all_told(heard, outcomes)


def test_a_run_that_finds_everything_done_starts_no_worker_and_shows_full_rows(
    make_spec: MakeSpec, settings: Settings, tmp_path: Path
) -> None:
    first = run(make_spec(gates=OPEN_GATES), settings, tmp_path / "work", Heard())
    heard = Heard()
    outcomes = run(make_spec(gates=OPEN_GATES), settings, tmp_path / "work", heard)
    assert outcomes == first
    assert heard.workers == []
    assert all(unit.reused for unit in heard.units)
    require_all_told(heard, outcomes)
