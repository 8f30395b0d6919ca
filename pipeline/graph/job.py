"""One conversion's units run to their end: cut, driven, told to whoever watches.

With mixed precision it is driven twice: what the units of a variant are is not known before its widths are. Both times
the same workers do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline import heap
from pipeline.errors import CorruptWeightsError, StorageError
from pipeline.graph.build import Inputs, JobUnits, build_units, make_variant_plan
from pipeline.graph.dag import Kind, WorkUnit, reachable_units
from pipeline.graph.driver import MAX_RECOVERIES, RECOVERABLE, Driver, Observer, StoredRecords
from pipeline.graph.executor import Executor, Finished, InlineExecutor
from pipeline.graph.stages.proof import proof_units, require_proven, weight_places
from pipeline.graph.stopping import Stopping
from pipeline.graph.tuning import Tuning
from pipeline.graph.worker import Worker
from pipeline.observe.events import (
    Degraded,
    EventSink,
    JobRevised,
    JobStarted,
    Phase,
    PhaseWork,
    StageFinished,
    Warned,
    WidthsChosen,
    WorkersReady,
    WorkersStarting,
)
from pipeline.storage.work import StageRecord, WorkStore
from pipeline.units import format_bytes

if TYPE_CHECKING:
    from pipeline.graph.convert import RunOptions
    from pipeline.graph.stages.call import JobContext

Records = dict[str, StageRecord]
"""Finished units' records by key."""

PHASES: dict[Kind, Phase] = {
    Kind.EMBED: Phase.CALIBRATE,
    Kind.CALIBRATE: Phase.CALIBRATE,
    Kind.COMPARE: Phase.CALIBRATE,
    Kind.PROPAGATE: Phase.CALIBRATE,
    Kind.ADD: Phase.CALIBRATE,
    Kind.MERGE: Phase.CALIBRATE,
    Kind.COMPENSATE: Phase.SOLVE,
    Kind.FACTOR: Phase.SOLVE,
    Kind.SENSE: Phase.CALIBRATE,
    Kind.APPRAISE: Phase.SOLVE,
    Kind.SCALES: Phase.SOLVE,
    Kind.SOLVE: Phase.SOLVE,
    Kind.PACK: Phase.PACK,
    Kind.OUTER: Phase.PACK,
    Kind.FORWARD: Phase.EVALUATE,
    Kind.SCORE: Phase.EVALUATE,
    Kind.CONTINUE: Phase.EVALUATE,
    Kind.GENERATE: Phase.EVALUATE,
    Kind.VERIFY: Phase.EVALUATE,
}


def run_job(
    inputs: Inputs,
    work: WorkStore,
    context: JobContext,
    options: RunOptions,
    tuning: Tuning,
    sink: EventSink,
    stopping: Stopping,
) -> tuple[Inputs, JobUnits, Records]:
    """Run what a conversion needs and return its inputs, with all widths chosen, its units, and the records of all
    goals.

    What an earlier run finished is found in the work store; when that is everything, no worker is started.

    Raises:
        PipelineError: when a unit, a worker or the cluster fails.
        GraphError: with the code ``graph.cancelled`` when the job is.
    """
    units, proofs = build_units(inputs, tuning), _proofs(inputs, work, context)
    num_workers = 1 if options.inline else options.workers
    observer = _Telling(inputs, num_workers, options.max_memory_bytes, sink, units.goals if units.appraisals else ())
    crew = _Crew(work, context, options, tuning, sink, stopping, observer)

    def make_goals(cut: Tuning) -> Sequence[WorkUnit]:
        return [*build_units(inputs, cut).goals, *proofs]

    try:
        with closing(crew):
            if units.appraisals:
                first = inputs
                appraised = crew.drive(lambda cut: build_units(first, cut).appraisals)
                inputs = _with_widths(inputs, units, appraised)
                units = build_units(inputs, tuning)
                observer.chosen(inputs)
            records = crew.drive(make_goals)
        for _ in range(MAX_RECOVERIES):
            if not _discard_damaged(units, records, work, observer, stopping):
                break
            with closing(crew):
                records = crew.drive(make_goals)
        require_proven(inputs, proofs, records, work)
    except CorruptWeightsError:
        # No worker is left that could still write something.
        if proofs:
            _discard_results(inputs, units, work)
        raise
    for place in work.lookup_all(units.leftovers):
        work.discard(*place)
    return inputs, units, records


def _with_widths(inputs: Inputs, units: JobUnits, records: Records) -> Inputs:
    """Return the inputs with the widths that what was appraised speaks for."""

    def damages(appraisals: Sequence[WorkUnit]) -> dict[str, float]:
        return {name: value for unit in appraisals for name, value in records[unit.key].summary["damages"].items()}

    plans = []
    for plan in inputs.variants:
        appraisals = units.variants[plan.spec.name].appraisals
        found = {bits: damages(own) for bits, own in appraisals.items()}
        plans.append(make_variant_plan(plan.spec, inputs.outline, found) if found else plan)
    return replace(inputs, variants=plans)


@dataclass
class _Crew:
    """The workers of a job, who are there from when there is something to do until ``close``."""

    work: WorkStore
    context: JobContext
    options: RunOptions
    tuning: Tuning
    sink: EventSink
    stopping: Stopping
    observer: _Telling
    _executor: Executor | None = field(default=None, init=False)

    def drive(self, make_goals: Callable[[Tuning], Sequence[WorkUnit]]) -> Records:
        """Run what the goals need, and return the records of those that are stored."""
        goals = {unit.place for unit in make_goals(self.tuning)}
        is_done = len(self.work.lookup_all(goals)) == len(goals)
        executor = _Absent() if is_done and self._executor is None else self._staffed()
        is_cancelled = self.stopping.is_cancelled
        return Driver(make_goals, self.tuning, self.work, executor, self.observer, is_cancelled=is_cancelled).run()

    def _staffed(self) -> Executor:
        if self._executor is None:
            self.sink.emit(WorkersStarting(self.observer.num_wanted))
            self._executor = _executor(self.context, self.options, self.stopping)
            heap.drop_code()
        self.observer.staffed(len(self._executor.workers))
        return self._executor

    def close(self) -> None:
        """Send them away."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None


def _proofs(inputs: Inputs, work: WorkStore, context: JobContext) -> list[WorkUnit]:
    """Return the units that prove streamed weights; none when nobody streamed them."""
    if context.streamed is None and not work.lookup_all(weight_places(inputs)):
        return []
    return proof_units(inputs)


def _discard_damaged(
    units: JobUnits, records: Records, work: WorkStore, observer: Observer, stopping: Stopping
) -> bool:
    """Return whether something of what will be published was not what was written, and is gone now. Stages are found by
    their sizes; here every file's digest is checked, which the assembly of a release relies on."""
    is_any = False
    for unit in (units.outer, *(pack for variant in units.variants.values() for pack in variant.packs)):
        stopping.check()
        try:
            for name in records[unit.key].files:
                work.open_checked(*unit.place, name)
        except StorageError as error:
            if error.code not in RECOVERABLE:
                raise
            observer.recovered(error.message)
            is_any = True
    return is_any


def _discard_results(inputs: Inputs, units: JobUnits, work: WorkStore) -> None:
    """Nothing is left of what was computed from weights that turned out to be wrong, nor of what they were. What files
    are proven to hold stays: the next run reads no tensor that is not so."""
    computed = reachable_units(units.goals)
    places = [*(unit.place for unit in computed if unit.is_durable), *(p for unit in computed for p in unit.saves)]
    for place in work.lookup_all([*places, *weight_places(inputs)]):
        work.discard(*place)


def _executor(context: JobContext, options: RunOptions, stopping: Stopping) -> Executor:
    if options.inline:
        return InlineExecutor(Worker(context))
    from pipeline.graph.cluster import RayExecutor

    return RayExecutor(context, options.workers, options.address, stopping)


class _Absent:
    """Stands in when everything is finished already, so that no cluster is started for nothing."""

    workers: Sequence[str] = ()
    is_expecting = False

    def node(self, worker: str) -> str:
        """Nobody is anywhere."""
        return ""

    def submit(self, *arguments: Any) -> None:
        """Never called."""
        raise AssertionError("something is to run though everything is there")

    def wait(self, timeout_s: float) -> None:
        """Nothing runs."""

    def forget(self, *arguments: Any) -> None:
        """Nothing is held."""

    def let_end(self, timeout_s: float) -> Sequence[Finished]:
        """Nothing runs."""
        return ()

    def close(self) -> None:
        """Nothing runs."""


class _Telling(Observer):
    """Turns what the driver sees into events."""

    def __init__(
        self,
        inputs: Inputs,
        num_workers: int,
        max_bytes: int | None,
        sink: EventSink,
        to_come: Sequence[WorkUnit] = (),
    ) -> None:
        """Begin; ``to_come`` are goals that the first plan does not know of yet, as far as they can be foreseen."""
        self._inputs, self.num_wanted, self._max_bytes, self._sink = inputs, num_workers, max_bytes, sink
        self._to_come = to_come
        self._num_ready = 0
        self._told: set[str] = set()
        self._is_started = self._is_to_revise = False

    def staffed(self, num_workers: int) -> None:
        """Tell how many workers there are, when that has changed."""
        if num_workers != self._num_ready:
            self._num_ready = num_workers
            self._sink.emit(WorkersReady(num_workers, self.num_wanted))

    def planned(self, todo: Sequence[WorkUnit], present: Sequence[WorkUnit], records: StoredRecords) -> None:
        """Announce the job once, and what is left of it once more when widths are chosen; and what an earlier run did
        of it."""
        if self._is_started and not self._is_to_revise:
            return
        reused = [unit for unit in present if unit.is_durable and unit.key not in self._told]
        if not self._is_started:
            foreseen = {unit.key: unit for unit in (*todo, *reused, *reachable_units(self._to_come))}
            work = _phase_work(list(foreseen.values()))
            variants = tuple(plan.spec.name for plan in self._inputs.variants)
            num_blocks = self._inputs.outline.skeleton.num_blocks
            self._sink.emit(JobStarted(self._inputs.spec.source, variants, num_blocks, work))
            self._is_started = True
        else:
            self._sink.emit(JobRevised(_phase_work([*todo, *reused])))
            self._is_to_revise = False
        for unit in sorted(reused, key=lambda unit: unit.block):
            self._tell(unit, records.get(unit.place), 0.0, reused=True)

    def chosen(self, inputs: Inputs) -> None:
        """Tell which widths mixed precision has chosen; what is left to do is told when it is planned."""
        self._is_to_revise = True
        for before, plan in zip(self._inputs.variants, inputs.variants, strict=True):
            if plan is not before:
                schemes = [matrix.scheme for matrix in plan.matrices.values() if matrix.scheme is not None]
                linears = Counter(scheme.bits for scheme in schemes)
                widths = {str(bits): linears[bits] for bits in sorted(linears)}
                self._sink.emit(WidthsChosen(plan.spec.name, widths, plan.predicted_kl))
        self._inputs = inputs

    def finished(self, unit: WorkUnit, record: StageRecord | None, seconds: float, peak_bytes: int) -> None:
        """Tell of a unit, and once when a worker took more memory than it may."""
        self._tell(unit, record, seconds, reused=False)
        if self._max_bytes is not None and peak_bytes > self._max_bytes:
            most, allowed = format_bytes(peak_bytes), format_bytes(self._max_bytes)
            self._sink.emit(Warned(f"a worker took {most} up to the end of {unit.title}; --max-memory is {allowed}"))
            self._max_bytes = None

    def recovered(self, reason: str) -> None:
        """Tell what is done again."""
        self._sink.emit(Warned(reason))

    def _tell(self, unit: WorkUnit, record: StageRecord | None, seconds: float, reused: bool) -> None:
        """Tell of a unit, and of what a solver did otherwise than asked."""
        self._told.add(unit.key)
        self._sink.emit(_finished(unit, record, seconds, reused))
        if unit.kind is Kind.PACK and record is not None:
            for name, report in record.summary["reports"].items():
                for reason in report["degradations"]:
                    self._sink.emit(Degraded(unit.variant, name, reason))


def _phase_work(units: Sequence[WorkUnit]) -> tuple[PhaseWork, ...]:
    return tuple(
        PhaseWork(phase, len(own), sum(unit.cost for unit in own))
        for phase in Phase
        if (own := [unit for unit in units if PHASES[unit.kind] is phase])
    )


def _finished(unit: WorkUnit, record: StageRecord | None, seconds: float, reused: bool) -> StageFinished:
    summary = record.summary if record is not None else {}
    # Of what an earlier run did, packed blocks are looked up, solves are not.
    reports = [summary] if unit.kind is Kind.SOLVE else list(summary.get("reports", {}).values())
    errors = [report["relative_error"] for report in reports if "relative_error" in report]
    return StageFinished(
        phase=PHASES[unit.kind],
        seconds=seconds,
        cost=unit.cost,
        block=unit.block if unit.block >= 0 else None,
        variant=unit.variant or None,
        group=unit.label,
        loss=summary.get("loss") if unit.kind is Kind.SOLVE else None,
        relative_error=max(errors, default=None),
        reused=reused,
    )
