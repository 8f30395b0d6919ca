"""The way of one release: pin, fetch, plan, run, judge, publish.

Read from ``convert``. Targets are probed before anything is computed, so a missing bucket or a store without
conditional writes costs seconds, not hours. Nothing is published for a variant whose Verdict did not pass.

From the moment that the work store is known to the end the job is announced there. A wish to cancel it is heeded in
every phase, and before each publication; one that has begun is completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from pipeline.calibrate.tokens import Text, TokenBatch, load_text, take_tokens
from pipeline.errors import CorruptWeightsError, GraphError
from pipeline.facts import FACTS_FILE, ReleaseFacts, SiblingFacts
from pipeline.graph.assemble import (
    Measured,
    Records,
    assemble_release,
    make_facts,
    measure_variant,
    weights_fingerprint,
)
from pipeline.graph.build import Inputs, JobUnits, make_variant_plan
from pipeline.graph.cost import cost_model
from pipeline.graph.engines import EngineGate, prepare_engines, require_loadable
from pipeline.graph.job import run_job
from pipeline.graph.memory import plan_memory
from pipeline.graph.naming import name_releases
from pipeline.graph.outline import make_outline, stamp_files
from pipeline.graph.plan import remote_outline, require_positions
from pipeline.graph.sources import announce_weights, forget_weights, pin
from pipeline.graph.stages.call import JobContext
from pipeline.graph.stopping import Stopping
from pipeline.hub.fetch import FetchedSource, OnProgress, fetch
from pipeline.hub.source import Source, needed_files
from pipeline.observe.events import EventSink, Published, SourceAdvanced, VariantJudged, Warned
from pipeline.quantize import triton_kernels
from pipeline.settings import Settings
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.spec import ConversionSpec
from pipeline.storage.directory import DirectoryStore
from pipeline.storage.manifest import release_prefix as revision_prefix
from pipeline.storage.objects import ObjectStore, open_store
from pipeline.storage.probe import probe
from pipeline.storage.refs import DEFAULT_REF, read_ref
from pipeline.storage.release import publish_release
from pipeline.storage.running import announced
from pipeline.storage.work import S3_ATTEMPTS, WorkStore, open_work_store
from pipeline.tensors.index import WeightIndex
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import FileStamp


@dataclass(frozen=True)
class RunOptions:
    """Where a conversion runs; none of it affects a byte.

    Attributes:
        work_dir: The work store: a directory that every worker reaches, or ``s3://bucket/prefix``.
        workers: Work units at a time.
        device: ``cpu`` or ``cuda``.
        address: Ray cluster to join, or None to start one here.
        inline: Run every unit in this process, without Ray.
        stream: Read weights on a hub or in a bucket block by block where they are, instead of fetching them first.
        max_memory_bytes: Memory that a worker may use; None for what it takes.
        shelf_bytes: Memory that a worker may hold passing outputs in before it spills them to disk; None for what the
            rest leaves of ``max_memory_bytes``.
    """

    work_dir: str | Path
    workers: int
    device: str = "cpu"
    address: str | None = None
    inline: bool = False
    stream: bool = False
    max_memory_bytes: int | None = None
    shelf_bytes: int | None = None


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
        GraphError: with the code ``graph.cancelled`` when somebody cancelled the job.
    """
    stores = open_targets(spec.targets, settings, sink)
    work = open_work_store(str(options.work_dir), settings)
    work.prepare()
    jobs = open_store(work.url, settings, attempts=S3_ATTEMPTS)
    with announced(jobs, spec.source, tuple(variant.name for variant in spec.variants)) as announcement:
        return _convert(spec, settings, options, sink, stores, work, Stopping(announcement.is_cancelled))


def _convert(
    spec: ConversionSpec,
    settings: Settings,
    options: RunOptions,
    sink: EventSink,
    stores: list[ObjectStore],
    work: WorkStore,
    stopping: Stopping,
) -> tuple[VariantOutcome, ...]:
    """Do what ``convert`` says, on stores that are there."""
    source = pin(spec.source, settings, sleep=stopping.sleep)
    names = name_releases(spec, source)
    outline = remote_outline(source, settings, spec.calibration.experts)
    plans = [make_variant_plan(variant, outline) for variant in spec.variants]
    require_positions(spec, outline)
    for plan in plans:
        require_loadable(spec.gates.engines, plan.spec.name, plan.contents(outline.skeleton.architecture))
    costs = cost_model(options.device, spec.precision)
    memory = plan_memory(outline, spec, options.workers, costs, options.max_memory_bytes)
    stopping.check()
    texts = load_texts(spec, settings, stopping)
    require_device(options)
    prepare_engines(spec.gates.engines, settings, sink, stopping)
    cautions = [names.caution] if names.caution else []
    cautions += [caution for plan in plans for caution in plan.cautions(spec.calibration)]
    for caution in dict.fromkeys(cautions):
        sink.emit(Warned(caution))
    is_streamed = options.stream and not source.is_local
    if is_streamed:
        advanced = _source_progress(source.weight_files, source, sink, stopping)
        source = announce_weights(source, outline.index, settings, work, advanced)
    fetched, stamps = fetch_source(source, settings, sink, stopping, with_weights=not is_streamed)
    seen = ref_sequences(stores, names.namespace, names.by_variant.values())
    index = outline.index if is_streamed else None
    inputs = gather_inputs(spec, fetched, texts, options.device, index)
    context = JobContext(
        work_url=work.url,
        source_folder=str(fetched.folder),
        source_commit=fetched.commit,
        stamps=tuple(sorted(stamps.items())),
        device=options.device,
        shelf_bytes=memory.shelf_bytes if options.shelf_bytes is None else options.shelf_bytes,
        freed_bytes=memory.freed_bytes,
        more_freed_bytes=memory.more_freed_bytes,
        streamed=source if is_streamed else None,
        max_memory_bytes=options.max_memory_bytes,
        experts=spec.calibration.experts,
    )
    stopping.check()
    try:
        inputs, units, records = run_job(inputs, work, context, options, memory.tuning, sink, stopping)
    except CorruptWeightsError:
        forget_weights(source, work)
        raise
    gate = EngineGate(inputs, fetched, units, records, work, settings, sink, stopping)
    measured = [gate.judge(measure_variant(inputs, plan, units, records)) for plan in inputs.variants]
    outcomes = []
    for own in measured:
        address = names.address(own.plan.spec.name)
        known = published_siblings(stores[0], address, weights_fingerprint(fetched, own.plan.spec, units))
        facts = make_facts(inputs, fetched, address, own, measured, units, known)
        _announce(own, sink)
        locations: tuple[str, ...] = ()
        if own.verdict.passed:
            locations = _publish(inputs, fetched, facts, units, records, work, stores, seen, sink, stopping)
        outcomes.append(VariantOutcome(facts, locations))
    return tuple(outcomes)


def fetch_source(
    source: Source, settings: Settings, sink: EventSink, stopping: Stopping, *, with_weights: bool = True
) -> tuple[FetchedSource, dict[str, FileStamp]]:
    """Return a source with its needed files local and verified, and what the weights files were when they were; says
    how far it is or what it waits for. On request the weights stay where they are.

    Raises:
        SourceError, StorageError: as ``fetch``.
        GraphError: with the code ``graph.cancelled`` when the job is.
    """
    left = () if with_weights else source.weight_files
    paths = [file.path for file in needed_files(source) if file.path not in left]
    advanced = _source_progress(paths, source, sink, stopping)
    # Somebody may write to a folder meanwhile, so it is stamped before its digests are taken. What comes from elsewhere
    # lies in our own cache, and is there only afterwards.
    before = stamp_files(Path(source.location), source.weight_files) if source.is_local else None
    fetched = fetch(
        source,
        settings,
        advanced,
        lambda reason: sink.emit(Warned(reason)),
        sleep=stopping.sleep,
        with_weights=with_weights,
    )
    if not with_weights:
        return fetched, {}
    return fetched, before or stamp_files(fetched.folder, source.weight_files)


def _source_progress(paths: Iterable[str], source: Source, sink: EventSink, stopping: Stopping) -> OnProgress:
    """Return what tells of the progress of some of a source's files, as one, and heeds a wish to cancel."""
    total_bytes = sum(source.file_sizes[path] for path in paths)
    done: dict[str, int] = {}

    def advanced(path: str, done_bytes: int, _: int) -> None:
        stopping.check()
        done[path] = done_bytes
        sink.emit(SourceAdvanced(path, sum(done.values()), total_bytes))

    return advanced


def open_targets(targets: Iterable[str], settings: Settings, sink: EventSink) -> list[ObjectStore]:
    """Return the targets' stores, each proven to be writable and to honour conditional writes.

    A directory that was not there is created and told: its name may be a slip.

    Raises:
        StorageError: naming the target that is not.
    """
    stores = [open_store(target, settings) for target in targets]
    for store in stores:
        is_new = isinstance(store, DirectoryStore) and not store.root.exists()
        probe(store)
        if is_new:
            sink.emit(Warned(f"created the directory {store.url}, which was not there"))
    return stores


def published_siblings(store: ObjectStore, address: str, fingerprint: str) -> tuple[SiblingFacts, ...]:
    """Return the siblings that a release with the same weights was published with last, so that making one variant
    again makes the same release again, and loses no comparison.

    Args:
        store: Where it would be.
        address: ``namespace/name``.
        fingerprint: Of the weights.
    """
    namespace, _, name = address.partition("/")
    ref = read_ref(store, namespace, name, DEFAULT_REF)
    blob = store.read(f"{revision_prefix(namespace, name, ref.revision)}{FACTS_FILE}") if ref is not None else None
    if blob is None:
        return ()
    try:
        facts = ReleaseFacts.model_validate_json(blob.data)
    except ValidationError:
        return ()  # made by another version, whose comparisons are not ours
    return facts.siblings if facts.spec_fingerprint == fingerprint else ()


def ref_sequences(stores: Iterable[ObjectStore], namespace: str, names: Iterable[str]) -> dict[tuple[str, str], int]:
    """Return how often the releases' refs have moved so far, by store and release: who publishes after another job that
    began later would otherwise undo what that one published.

    Raises:
        StorageError: when a store cannot be read.
    """
    wanted = [(store, name) for name in names for store in stores]
    refs = {(store.url, f"{namespace}/{name}"): read_ref(store, namespace, name, DEFAULT_REF) for store, name in wanted}
    return {place: ref.sequence if ref is not None else 0 for place, ref in refs.items()}


def load_texts(spec: ConversionSpec, settings: Settings, stopping: Stopping | None = None) -> tuple[Text, Text]:
    """Return the calibration text and the held-out text, before they are tokenized.

    Raises:
        CalibrationError: when one cannot be read.
        GraphError: with the code ``graph.cancelled`` when the job is.
    """
    seed, sleep = spec.calibration.seed, (stopping or Stopping()).sleep
    calibration = load_text(spec.calibration.text, "calibration", seed, settings, sleep)
    return calibration, load_text(spec.gates.heldout, "heldout", seed, settings, sleep)


def gather_inputs(
    spec: ConversionSpec,
    fetched: FetchedSource,
    texts: tuple[Text, Text],
    device: str,
    index: WeightIndex | None = None,
) -> Inputs:
    """Return everything that the conversion's bytes depend on.

    Args:
        spec: What to make.
        fetched: The source; of one that is streamed, all but its weights.
        texts: Calibration text and held-out text.
        device: ``cpu`` or ``cuda``.
        index: Where the tensors are; None to read the headers in the folder.

    Raises:
        SourceError: when the source cannot be converted.
        PlanError: when a variant cannot be made from it.
        CalibrationError: when a text is too short.
    """
    index = index or read_folder_index(fetched.folder)
    outline = make_outline(fetched.folder, index, experts=spec.calibration.experts)
    variants = [make_variant_plan(variant, outline) for variant in spec.variants]
    encode = TextTokenizer(fetched.folder).encode
    require_positions(spec, outline, lambda prompt: len(encode(prompt, with_special=True)))
    calibration, heldout = _tokens(spec, encode, texts)
    return Inputs(outline, fetched.digests, spec, variants, calibration, heldout, device)


def _tokens(
    spec: ConversionSpec, encode: Callable[[str], list[int]], texts: tuple[Text, Text]
) -> tuple[TokenBatch, TokenBatch]:
    wanted, gates = spec.calibration, spec.gates
    text, other = texts
    calibration = take_tokens(text, encode, wanted.samples, wanted.length)
    # Held-out means held out: of the same text, the tokens after the calibration's.
    skip = wanted.samples * wanted.length if other.content == text.content else 0
    return calibration, take_tokens(other, encode, gates.heldout_samples, gates.heldout_length, skip)


def require_device(options: RunOptions) -> None:
    """Return unless it is known already that nothing could run: a cluster is only asked once there is work for it.

    Raises:
        GraphError: when this machine is to compute on a GPU and has none.
        QuantizationError: when it has one, and not what solves layers there.
    """
    if options.device != "cuda" or options.address is not None:
        return
    if not torch.cuda.is_available():
        raise GraphError(
            "--device cuda needs a GPU, and this machine has none that torch can use",
            code="graph.infeasible",
            hint="run with --device cpu, or join a cluster with GPUs with --address",
        )
    triton_kernels.load()


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
    records: Records,
    work: WorkStore,
    stores: list[ObjectStore],
    seen: Mapping[tuple[str, str], int],
    sink: EventSink,
    stopping: Stopping,
) -> tuple[str, ...]:
    namespace, _, name = facts.release.partition("/")
    provenance = {
        "source": facts.source.name,
        "commit": facts.source.commit,
        "variant": facts.variant.model_dump(mode="json"),
        "spec_fingerprint": facts.spec_fingerprint,
        "versions": facts.versions,
    }
    locations = []
    # Private: another run may be assembling the same release in the same work directory.
    with work.private_folder() as folder:
        assembled = assemble_release(inputs, fetched, facts, units, records, work, folder, stopping)
        for store in stores:
            stopping.check()
            done = publish_release(
                store,
                folder,
                namespace,
                name,
                provenance,
                file_names=assembled.written,
                stored=assembled.stored,
                verdict_passed=facts.verdict.passed,
                seen={DEFAULT_REF: seen[store.url, facts.release]},
            )
            sink.emit(Published(facts.variant.name, facts.release, done.revision, done.path_or_uri, facts.size_bytes))
            locations.append(done.path_or_uri)
    return tuple(locations)


def resolve_device(wanted: str) -> str:
    """Return ``cpu`` or ``cuda``: what was wanted, or for ``auto`` what this machine has."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
