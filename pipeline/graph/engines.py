"""Engines that are asked about a release: before it is published when the spec demands it, and afterwards by `verify`.

What an engine was found to do is written down in the work store, under what it follows from: the weights, what
config.json says of them, the prompts, and the engine's pinned packages. So a run that is resumed asks no engine twice
about one variant, and writes the same card. A failure is not written down: it may be the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.errors import PlanError
from pipeline.facts import Check
from pipeline.fingerprint import fingerprint
from pipeline.formats.loaders import Contents, limits
from pipeline.graph.assemble import Measured, Records, weights_fingerprint, write_model
from pipeline.graph.build import Inputs, JobUnits
from pipeline.graph.stopping import Stopping
from pipeline.hub.fetch import FetchedSource
from pipeline.observe.events import EngineNews, EventSink
from pipeline.settings import Settings
from pipeline.spec import Engine
from pipeline.storage.work import WorkStore
from pipeline.validate.engines.environment import check_engine, ensure_environment, pinned_requirements
from pipeline.validate.release import ReleaseModel

STAGE = "engine"
"""Stage of the work store where engines' answers are."""


def require_loadable(engines: Sequence[Engine], variant: str, contents: Contents) -> None:
    """Return when nothing is known that keeps one of the engines from loading a variant.

    Raises:
        PlanError: naming the variant and the engine, with what is known.
    """
    for engine in engines:
        for limit in limits(contents):
            if limit.loader.value == engine.value and not limit.loads:
                raise PlanError(
                    f"variant {variant}: gates.engines demands {engine}, and {limit.text}",
                    code="plan.engine",
                    hint="choose another variant or format, or take the engine out of gates.engines",
                )


def prepare_engines(engines: Sequence[Engine], settings: Settings, sink: EventSink, stopping: Stopping) -> None:
    """Every engine's environment is there: what cannot be installed is known before anything is computed.

    Raises:
        EngineError: with pip's last words.
        GraphError: with the code ``graph.cancelled`` when the job is.
    """
    for engine in engines:
        ensure_environment(engine, settings.cache_dir, partial(_tell, sink, engine), stopping.check)


@dataclass(frozen=True)
class EngineGate:
    """The engines that a spec demands, and what they are asked about.

    Attributes:
        inputs: What the conversion depends on.
        fetched: The source.
        units: Of this run.
        records: What its units left.
        work: Where that is, and engines' answers.
        settings: Where environments are.
        sink: Told what takes long.
        stopping: Knows whether the job is wanted still.
    """

    inputs: Inputs
    fetched: FetchedSource
    units: JobUnits
    records: Records
    work: WorkStore
    settings: Settings
    sink: EventSink
    stopping: Stopping

    def judge(self, own: Measured) -> Measured:
        """Return a variant with the engines' answers in its Verdict. One that has failed before is not shown to any.

        Raises:
            EngineError: when an environment cannot be made.
            GraphError: with the code ``graph.cancelled`` when the job is.
        """
        if not own.verdict.passed:
            return own
        checks = tuple(self._answer(engine, own) for engine in self.inputs.spec.gates.engines)
        return replace(own, verdict=own.verdict.model_copy(update={"checks": (*own.verdict.checks, *checks)}))

    def _answer(self, engine: Engine, own: Measured) -> Check:
        """Return what an engine was found to do with a variant, or finds now."""
        variant, max_tokens = own.plan.spec, self.inputs.spec.gates.generated_tokens
        prompts = [sample.prompt for sample in own.verdict.samples]
        key = fingerprint(
            {
                "engine": engine,
                "requirements": pinned_requirements(engine),
                "weights": weights_fingerprint(self.fetched, variant, self.units),
                "config": own.plan.quantization_config,
                "prompts": prompts,
                "max_tokens": max_tokens,
            }
        )
        found = self.work.lookup(STAGE, key)
        if found is not None:
            return Check.model_validate(found.summary)
        with self.work.private_folder() as folder:
            made = (self.inputs, self.fetched, variant, self.units, self.records, self.work, folder, own.size_bytes)
            for name, file in write_model(*made, self.stopping).stored.items():
                file.place(folder / name)
            contents = own.plan.contents(self.inputs.outline.skeleton.architecture)
            _tell(self.sink, engine, f"{variant.name}: loading it in {engine}")
            asked = (engine, folder, prompts, max_tokens, contents, self.settings)
            check = ask_engine(*asked, lambda line: None, self.stopping.check)
        if check.passed:
            with self.work.writing(STAGE, key) as writer:
                writer.finish(check.model_dump(mode="json"))
        return check


def _tell(sink: EventSink, engine: Engine, line: str) -> None:
    sink.emit(EngineNews(engine.value, line))


def ask_engine(
    engine: str,
    folder: Path,
    prompts: Sequence[str],
    max_tokens: int,
    contents: Contents,
    settings: Settings,
    on_line: Callable[[str], None],
    heed: Callable[[], None] = lambda: None,
) -> Check:
    """Return whether an engine computes what the project's own loader computes.

    Args:
        engine: The engine.
        folder: The release's files.
        prompts: Texts to continue.
        max_tokens: Tokens to generate for each.
        contents: What the release holds.
        settings: Where environments are kept.
        on_line: Told what takes long.
        heed: Called while the engine works; what it raises ends that.

    Raises:
        PipelineError: when the files cannot be read, or the environment cannot be made.
    """
    model = ReleaseModel(folder)
    model.attach()
    encoded = [(prompt, model.tokenizer.encode(prompt, with_special=True)) for prompt in prompts]
    known = [limit.text for limit in limits(contents) if limit.loader == engine]
    return check_engine(engine, folder, model.logits, encoded, max_tokens, settings.cache_dir, on_line, known, heed)
