"""The way of one release: pin, fetch, plan, run, judge, publish.

Read from ``convert``. Targets are probed before anything is computed, so a missing bucket or a store without
conditional writes costs seconds, not hours. Nothing is published for a variant whose Verdict did not pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.calibrate.tokens import Text, TokenBatch, load_text, take_tokens
from pipeline.errors import SpecError
from pipeline.facts import ReleaseFacts
from pipeline.graph.assemble import Measured, assemble_release, make_facts, measure_variant
from pipeline.graph.build import Inputs, JobUnits, build_units, make_variant_plan
from pipeline.graph.cluster import RayExecutor
from pipeline.graph.dag import Executor, InlineExecutor, Kind, WorkUnit, reachable_units, required_units, run_units
from pipeline.graph.outline import open_folder
from pipeline.graph.stages import JobContext, run_unit
from pipeline.hub.fetch import FetchedSource, fetch
from pipeline.hub.source import needed_files, pin_source
from pipeline.observe.events import (
    Degraded,
    EventSink,
    JobStarted,
    Phase,
    PhaseWork,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    Warned,
)
from pipeline.settings import Settings
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.spec import ConversionSpec
from pipeline.storage.objects import ObjectStore, open_store
from pipeline.storage.probe import probe
from pipeline.storage.release import publish_release
from pipeline.storage.work import StageRecord, WorkStore

PHASES: dict[Kind, Phase] = {
    Kind.EMBED: Phase.CALIBRATE,
    Kind.CALIBRATE: Phase.CALIBRATE,
    Kind.MERGE: Phase.CALIBRATE,
    Kind.SCALES: Phase.SOLVE,
    Kind.SOLVE: Phase.SOLVE,
    Kind.PACK: Phase.PACK,
    Kind.OUTER: Phase.PACK,
    Kind.EVALUATE: Phase.EVALUATE,
    Kind.GENERATE: Phase.EVALUATE,
}


@dataclass(frozen=True)
class RunOptions:
    """Where a conversion runs; none of it affects a byte.

    Attributes:
        work_dir: Folder of the work store.
        workers: Work units at a time.
        device: ``cpu`` or ``cuda``.
        address: Ray cluster to join, or None to start one here.
        inline: Run every unit in this process, without Ray.
    """

    work_dir: Path
    workers: int
    device: str = "cpu"
    address: str | None = None
    inline: bool = False


@dataclass(frozen=True)
class VariantOutcome:
    """What became of one variant.

    Attributes:
        facts: Everything known of it, its Verdict included.
        locations: Where it was published, one for each target; empty when its Verdict did not pass.
    """

    facts: ReleaseFacts
    locations: tuple[str, ...]


def convert(
    spec: ConversionSpec, settings: Settings, options: RunOptions, sink: EventSink
) -> tuple[VariantOutcome, ...]:
    """Convert a source and return what became of each variant, in the order of the spec.

    Idempotent: units that an earlier run finished are found in the work store by their keys, files that are published
    already are not written again. A rerun after a kill at any point gives the same bytes.

    Raises:
        PipelineError: when the source, the text, the plan, the target or the cluster cannot be used. A failed gate is
            no error: its outcome has no locations.
    """
    stores = open_targets(spec.targets, settings)
    fetched = fetch_source(spec.source, settings, sink)
    namespace, prefix = release_prefix(spec, fetched)
    inputs = gather_inputs(spec, fetched, settings, options.device)
    for caution in dict.fromkeys(c for plan in inputs.variants for c in plan.cautions(spec.calibration)):
        sink.emit(Warned(caution))
    units = build_units(inputs)
    work = WorkStore(options.work_dir)
    work.sweep()
    context = JobContext(str(work.root), str(fetched.folder), options.device)
    records = _run(inputs, units, work, context, options, sink)
    measured = [measure_variant(inputs, plan, units, records) for plan in inputs.variants]
    outcomes = []
    for own in measured:
        name = f"{prefix}-{own.plan.spec.name}"
        facts = make_facts(inputs, fetched, f"{namespace}/{name}", own, measured)
        _announce(own, sink)
        locations = _publish(inputs, fetched, facts, units, work, stores, sink) if own.verdict.passed else ()
        outcomes.append(VariantOutcome(facts, locations))
    return tuple(outcomes)


def fetch_source(text: str, settings: Settings, sink: EventSink) -> FetchedSource:
    """Return the source that ``text`` means, its needed files local and verified; says how far it is.

    Raises:
        SourceError, StorageError: as ``pin_source`` and ``fetch``.
    """
    source = pin_source(text, settings)
    total_bytes = sum(file.size_bytes for file in needed_files(source))
    done: dict[str, int] = {}

    def advanced(path: str, done_bytes: int, _: int) -> None:
        done[path] = done_bytes
        sink.emit(SourceAdvanced(path, sum(done.values()), total_bytes))

    return fetch(source, settings, advanced)


def open_targets(targets: Iterable[str], settings: Settings) -> list[ObjectStore]:
    """Return the targets' stores, each proven to be writable and to honour conditional writes.

    Raises:
        StorageError: naming the target that is not.
    """
    stores = [open_store(target, settings) for target in targets]
    for store in stores:
        probe(store)
    return stores


def release_prefix(spec: ConversionSpec, fetched: FetchedSource) -> tuple[str, str]:
    """Return namespace and name prefix of the releases: the spec's, else the source's.

    Raises:
        SpecError: when the spec's ``release`` is not ``namespace/name``.
    """
    if spec.release:
        namespace, slash, name = spec.release.partition("/")
        if not slash or not namespace or not name or "/" in name:
            raise SpecError(f"release {spec.release!r} is not namespace/name", hint="for example --release team/model")
        return namespace, name
    namespace, slash, name = fetched.source.name.rpartition("/")
    return (namespace if slash else "local"), name


def gather_inputs(spec: ConversionSpec, fetched: FetchedSource, settings: Settings, device: str) -> Inputs:
    """Return everything that the conversion's bytes depend on.

    Raises:
        SourceError: when the source cannot be converted.
        PlanError: when a variant cannot be made from it.
        CalibrationError: when a text is too short or unreadable.
    """
    outline = open_folder(fetched.folder).outline
    variants = [make_variant_plan(variant, outline) for variant in spec.variants]
    calibration, heldout = _tokens(spec, fetched, settings)
    return Inputs(outline, fetched.digests, spec, variants, calibration, heldout, device)


def _tokens(spec: ConversionSpec, fetched: FetchedSource, settings: Settings) -> tuple[TokenBatch, TokenBatch]:
    encode = TextTokenizer(fetched.folder).encode
    wanted, gates = spec.calibration, spec.gates
    text = load_text(wanted.text, "calibration", wanted.seed, settings)
    calibration = take_tokens(text, encode, wanted.samples, wanted.length)
    other: Text = load_text(gates.heldout, "heldout", wanted.seed, settings)
    # Held-out means held out: of the same text, the tokens after the calibration's.
    skip = wanted.samples * wanted.length if other.content == text.content else 0
    return calibration, take_tokens(other, encode, gates.heldout_samples, gates.heldout_length, skip)


def _run(
    inputs: Inputs, units: JobUnits, work: WorkStore, context: JobContext, options: RunOptions, sink: EventSink
) -> dict[str, StageRecord]:
    goals = units.goals
    order, present = required_units(goals, work)
    _announce_start(inputs, [*order, *(unit for unit in reachable_units(goals) if unit.key in present)], sink)
    janitor = Janitor(units.hidden, order)

    def finished(unit: WorkUnit, record: StageRecord, seconds: float, reused: bool) -> None:
        sink.emit(_stage_event(unit, record, seconds, reused))
        if unit.kind is Kind.SOLVE:
            for name, report in record.summary["reports"].items():
                for reason in report["degradations"]:
                    sink.emit(Degraded(unit.variant, name, reason))

    if not order:
        return run_units(goals, work, NoExecutor(), finished)
    with closing(_executor(context, options)) as executor:
        return run_units(goals, work, executor, finished, janitor.after)


def _executor(context: JobContext, options: RunOptions) -> Executor:
    if options.inline:
        return InlineExecutor(lambda unit: run_unit(context, unit))
    return RayExecutor(context, options.workers, options.address)


class NoExecutor:
    """Stands in when everything is finished already, so that no cluster is started for nothing."""

    num_slots = 0

    def submit(self, unit: WorkUnit) -> None:
        """Never called."""
        raise AssertionError(f"{unit.kind} was submitted though nothing was missing")

    def wait(self) -> tuple[WorkUnit, StageRecord, float]:
        """Never called."""
        raise AssertionError("nothing runs")

    def close(self) -> None:
        """Nothing runs."""


class Janitor:
    """Knows when hidden states have been read for the last time, so that the disk holds a few blocks' worth only."""

    def __init__(self, hidden: Iterable[WorkUnit], order: Iterable[WorkUnit]) -> None:
        self._hidden = {unit.key for unit in hidden}
        self._readers: dict[str, int] = {}
        for unit in order:
            for need in unit.needs:
                self._readers[need.key] = self._readers.get(need.key, 0) + 1

    def after(self, unit: WorkUnit) -> list[WorkUnit]:
        """Return the units whose outputs nobody reads again now that ``unit`` has finished."""
        stale = []
        for need in unit.needs:
            self._readers[need.key] -= 1
            if self._readers[need.key] == 0 and need.key in self._hidden:
                stale.append(need)
        return stale


def _announce_start(inputs: Inputs, counted: list[WorkUnit], sink: EventSink) -> None:
    work = tuple(
        PhaseWork(phase, len(own), sum(unit.cost for unit in own))
        for phase in Phase
        if (own := [unit for unit in counted if PHASES[unit.kind] is phase])
    )
    variants = tuple(plan.spec.name for plan in inputs.variants)
    sink.emit(JobStarted(inputs.spec.source, variants, inputs.outline.skeleton.num_blocks, work))


def _stage_event(unit: WorkUnit, record: StageRecord, seconds: float, reused: bool) -> StageFinished:
    reports: dict[str, Any] = record.summary.get("reports", {})
    errors = [report["relative_error"] for report in reports.values()]
    return StageFinished(
        phase=PHASES[unit.kind],
        seconds=seconds,
        cost=unit.cost,
        block=unit.block if unit.block >= 0 else None,
        variant=unit.variant or None,
        group=unit.label,
        loss=record.summary.get("loss"),
        relative_error=max(errors) if errors else None,
        reused=reused,
    )


def _announce(own: Measured, sink: EventSink) -> None:
    quality = own.quality
    figures = {
        "kl": quality.kl,
        "perplexity": quality.perplexity,
        "source_perplexity": quality.source_perplexity,
        "top1_agreement": quality.top1_agreement,
    }
    failures = tuple(f"{check.name}: {check.detail}" for check in own.verdict.failures)
    sink.emit(VariantJudged(own.plan.spec.name, own.verdict.passed, failures, figures))


def _publish(
    inputs: Inputs,
    fetched: FetchedSource,
    facts: ReleaseFacts,
    units: JobUnits,
    work: WorkStore,
    stores: list[ObjectStore],
    sink: EventSink,
) -> tuple[str, ...]:
    folder = work.root / "releases" / facts.spec_fingerprint
    names = assemble_release(inputs, fetched, facts, units, work, folder)
    namespace, _, name = facts.release.partition("/")
    provenance = {
        "source": facts.source.name,
        "commit": facts.source.commit,
        "variant": facts.variant.model_dump(mode="json"),
        "spec_fingerprint": facts.spec_fingerprint,
        "versions": facts.versions,
    }
    locations = []
    for store in stores:
        published = publish_release(
            store, folder, namespace, name, provenance, file_names=names, verdict_passed=facts.verdict.passed
        )
        sink.emit(
            Published(facts.variant.name, facts.release, published.revision, published.path_or_uri, facts.size_bytes)
        )
        locations.append(published.path_or_uri)
    return tuple(locations)


def resolve_device(wanted: str) -> str:
    """Return ``cpu`` or ``cuda``: what was wanted, or for ``auto`` what this machine has."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
