"""What a conversion says while it runs: values, emitted by the driver in the order in which things finished.

A job says ``SourceAdvanced`` while the source's files come in, ``WorkersStarting`` when it asks for workers and
``WorkersReady`` whenever their number has changed (a job that finds everything done starts none), ``JobStarted`` once,
then one ``StageFinished`` for every unit of work that it declared there, with ``Warned`` and ``Degraded`` where they
arise. With mixed precision it declares what can be foreseen; ``WidthsChosen`` for every such variant and one
``JobRevised`` follow when the rest is known. It ends with one ``Published`` or failing ``VariantJudged`` per variant,
and with ``Failed`` when the command fails. Costs are estimated seconds on one worker of the reference machine,
comparable over all phases.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self


class Phase(StrEnum):
    """A kind of work unit, in the order in which a block passes through them."""

    CALIBRATE = "calibrate"
    SOLVE = "solve"
    PACK = "pack"
    EVALUATE = "evaluate"


class EventKind(StrEnum):
    """The name of an event in its JSON form."""

    SOURCE_ADVANCED = "source_advanced"
    WORKERS_STARTING = "workers_starting"
    WORKERS_READY = "workers_ready"
    JOB_STARTED = "job_started"
    WIDTHS_CHOSEN = "widths_chosen"
    JOB_REVISED = "job_revised"
    STAGE_FINISHED = "stage_finished"
    WARNED = "warned"
    DEGRADED = "degraded"
    ENGINE_NEWS = "engine_news"
    VARIANT_JUDGED = "variant_judged"
    PUBLISHED = "published"
    FAILED = "failed"


@dataclass(frozen=True)
class PhaseWork:
    """The work of one phase, known before it starts.

    Attributes:
        phase: Its kind.
        num_units: How many ``StageFinished`` events will be emitted for it.
        cost: The sum of their costs, in seconds.
    """

    phase: Phase
    num_units: int
    cost: float


@dataclass(frozen=True)
class SourceAdvanced:
    """More of the source's files lies here, verified or on its way, or was read where it is to take its digest.

    Attributes:
        path: The file at hand.
        done_bytes: Bytes of all files that are wanted now which are fetched and hashed.
        total_bytes: Bytes of all files that are wanted now: first those that stay where they are, then those that are
            fetched.
    """

    kind: ClassVar[EventKind] = EventKind.SOURCE_ADVANCED
    path: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class WorkersStarting:
    """Workers are asked for; the first takes some seconds until it can work.

    Attributes:
        num_wanted: How many.
    """

    kind: ClassVar[EventKind] = EventKind.WORKERS_STARTING
    num_wanted: int


@dataclass(frozen=True)
class WorkersReady:
    """The number of workers that take work has changed: some have started, or one was lost.

    Attributes:
        num_ready: How many there are now.
        num_wanted: How many were asked for.
    """

    kind: ClassVar[EventKind] = EventKind.WORKERS_READY
    num_ready: int
    num_wanted: int


@dataclass(frozen=True)
class JobStarted:
    """The plan is made and work begins.

    Attributes:
        source: Name of the source.
        variants: Names of the variants.
        num_blocks: Decoder blocks of the source.
        work: The phases that will run.
    """

    kind: ClassVar[EventKind] = EventKind.JOB_STARTED
    source: str
    variants: tuple[str, ...]
    num_blocks: int
    work: tuple[PhaseWork, ...]


@dataclass(frozen=True)
class WidthsChosen:
    """Mixed precision has chosen the width of every linear of a variant.

    Attributes:
        variant: Its name.
        linears: How many quantized linears have each width, by its number of bits.
        predicted_kl: What their errors alone add to the divergence, as gradients predict it.
    """

    kind: ClassVar[EventKind] = EventKind.WIDTHS_CHOSEN
    variant: str
    linears: dict[str, int]
    predicted_kl: float


@dataclass(frozen=True)
class JobRevised:
    """What is left to do is known anew.

    Attributes:
        left: The phases with what will yet be finished of each.
    """

    kind: ClassVar[EventKind] = EventKind.JOB_REVISED
    left: tuple[PhaseWork, ...]


@dataclass(frozen=True)
class StageFinished:
    """One unit of work is done, or was found done by an earlier run.

    Attributes:
        phase: Kind of the unit.
        seconds: Time that it took where it ran; 0 when it was reused.
        cost: Its share of the phase's cost: the seconds that it was estimated at.
        block: Index of the decoder block, or None where there is none.
        variant: Name of the variant, or None for work that all variants share.
        group: The linears that were solved together, for example ``self_attn.qkv``; empty where there is no such thing.
        loss: Mean squared output error summed over outputs, per token; None where nothing was solved.
        relative_error: sqrt of tr(dW H dW^T) / tr(W H W^T), for a packed block its worst linear's; None where nothing
            was solved.
        reused: Whether an earlier run had done it.
    """

    kind: ClassVar[EventKind] = EventKind.STAGE_FINISHED
    phase: Phase
    seconds: float
    cost: float
    block: int | None = None
    variant: str | None = None
    group: str = ""
    loss: float | None = None
    relative_error: float | None = None
    reused: bool = False


@dataclass(frozen=True)
class Warned:
    """Something that a person should know and that changes no bytes."""

    kind: ClassVar[EventKind] = EventKind.WARNED
    message: str


@dataclass(frozen=True)
class Degraded:
    """A solver did otherwise than asked; the card will say so.

    Attributes:
        variant: Name of the variant.
        module: Name of the linear.
        reason: What was done instead.
    """

    kind: ClassVar[EventKind] = EventKind.DEGRADED
    variant: str
    module: str
    reason: str


@dataclass(frozen=True)
class EngineNews:
    """Something with an engine takes long: its environment is installed, or it loads a variant.

    Attributes:
        engine: Its name.
        message: What takes long.
    """

    kind: ClassVar[EventKind] = EventKind.ENGINE_NEWS
    engine: str
    message: str


@dataclass(frozen=True)
class VariantJudged:
    """The gates have answered for one variant.

    Attributes:
        variant: Name of the variant.
        passed: Whether every check passed.
        failures: For each check that failed, its name and detail in one line.
        figures: Figures worth showing, for example ``kl``, ``perplexity``, ``source_perplexity``.
    """

    kind: ClassVar[EventKind] = EventKind.VARIANT_JUDGED
    variant: str
    passed: bool
    failures: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A release is complete in a target and its ref points to it.

    Attributes:
        variant: Name of the variant.
        release: ``namespace/name``.
        revision: Name of the immutable folder.
        location: Where it can be read from.
        size_bytes: Bytes of weights.
    """

    kind: ClassVar[EventKind] = EventKind.PUBLISHED
    variant: str
    release: str
    revision: str
    location: str
    size_bytes: int


@dataclass(frozen=True)
class Failed:
    """The command ends here without having done all that was asked for.

    Attributes:
        code: Stable reason, as on ``PipelineError``; or ``interrupted``, ``terminated``, ``usage``.
        message: What is wrong.
        hint: What to do next; may be empty.
    """

    kind: ClassVar[EventKind] = EventKind.FAILED
    code: str
    message: str
    hint: str = ""


Event = (
    SourceAdvanced
    | WorkersStarting
    | WorkersReady
    | JobStarted
    | WidthsChosen
    | JobRevised
    | StageFinished
    | Warned
    | Degraded
    | EngineNews
    | VariantJudged
    | Published
    | Failed
)


class EventSink(Protocol):
    """Somewhere that events go. Used as a context manager it is closed on the way out."""

    def emit(self, event: Event) -> None:
        """Take one event; events of one job come from one thread."""

    def close(self) -> None:
        """Show what is left to show and give back the terminal; further calls do nothing."""


class ClosingSink:
    """Base of sinks: leaving its ``with`` block closes it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back nothing; sinks that hold something override this."""


def to_json(event: Event) -> str:
    """Return the event as one line of plain ASCII JSON, its kind first under ``event``.

    Infinite and undefined numbers, which JSON cannot hold, are the strings ``Infinity``, ``-Infinity`` and ``NaN``.
    """
    body = {"event": event.kind.value} | {item.name: _plain(getattr(event, item.name)) for item in fields(event)}
    return json.dumps(body, ensure_ascii=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, PhaseWork):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
