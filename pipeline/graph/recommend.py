"""Which variant to take of a source that has to fit into a device's memory, and be loaded by an engine.

Sizes are exact: they follow from the shapes in the source's headers. What a variant loses is not known before it is
made; what stands here was measured on one small model (docs/benchmarks.md). Only the order of the variants is used:
fewer bits lose more, and at equal bits GPTQ alone more than GPTQ after activation-aware scales. That larger models have
the same order is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pipeline.errors import PlanError
from pipeline.formats.loaders import Loader, limits
from pipeline.graph.build import VariantPlan, make_variant_plan
from pipeline.graph.mixed import RUNTIME_BYTES, packed_bytes
from pipeline.graph.outline import Outline
from pipeline.graph.plan import remote_outline
from pipeline.graph.sources import pin
from pipeline.publish.tensor_parallel import kernel_refusal
from pipeline.settings import Settings
from pipeline.skeleton.limits import kv_cache
from pipeline.spec import ExpertStatistics, VariantSpec, average_width
from pipeline.units import format_bytes, parse_bytes

LOSSES: Mapping[str, float] = {
    "rtn-w8-g128": 0.0026,
    "w8a8-int8": 0.0104,
    "gptq-w6-g128": 0.011,
    "fp8-dynamic": 0.0224,
    "gptq-w5-g128": 0.044,
    "awq-gptq-w4-g128": 0.108,
    "gptq-w4-g128-ct": 0.139,
    "gptq-w4-g128": 0.139,
    "gptq-w3-g128-ct": 0.508,
    "gptq-w3-g128": 0.508,
}
"""The variants that are looked at, and KL divergences (nats per token) of the 135M model of docs/benchmarks.md with
them: in groups of 64, 8 bits by row. Where two lose the same, the one that more loaders read comes first."""

WIDTH_LOSSES = {3.0: 0.508, 4.0: 0.139, 4.5: 0.074, 5.0: 0.044, 6.0: 0.011, 8.0: 0.0026}
"""The same by average width, GPTQ: what a mix of widths is placed by."""

MIXED = "mix"
"""What stands for the variant that takes all the memory there is."""

VLLM_WIDTHS = (4, 8)
"""Widths that vLLM has kernels for on every GPU."""


@dataclass(frozen=True)
class Candidate:
    """A variant that was looked at.

    Attributes:
        name: Its short name; ``mix`` for the one whose widths follow from the memory.
        variant: As a spec file has it, where the name cannot say it; else None.
        size_bytes: Of all weight files; 0 where it cannot be made.
        needed_bytes: The same with KV cache and what an engine takes itself.
        average_bits: Mean width of quantized weights.
        loss: KL divergence of the small model; for the order alone.
        fits: Whether the memory is enough.
        obstacle: Why it is not to be taken whatever the memory; empty when nothing speaks against it.
    """

    name: str
    variant: dict[str, Any] | None
    size_bytes: int
    needed_bytes: int
    average_bits: float
    loss: float
    fits: bool
    obstacle: str

    @property
    def is_eligible(self) -> bool:
        """Whether it could be taken."""
        return self.fits and not self.obstacle


@dataclass(frozen=True)
class Recommendation:
    """What to take, and what else was looked at.

    Attributes:
        source: Name of the source.
        source_bytes: Of its weights.
        memory_bytes: Of the device.
        context: Tokens that the KV cache has room for.
        kv_cache_bytes: Of that.
        engine: The engine, or empty for any.
        candidates: All variants that were looked at, those that lose least first.
        reasons: Why the first that can be taken is taken, in sentences.
    """

    source: str
    source_bytes: int
    memory_bytes: int
    context: int
    kv_cache_bytes: int
    engine: str
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        """The one to take."""
        return next(candidate for candidate in self.candidates if candidate.is_eligible)

    def as_dict(self) -> dict[str, Any]:
        """Return the recommendation as JSON values."""
        return {**asdict(self), "best": self.best.name}


def recommend(source: str, memory: str, engine: str, context: int, settings: Settings) -> Recommendation:
    """Return which variant of a source to take.

    Args:
        source: A folder, ``org/name[@revision]`` or ``s3://bucket/prefix``; config and headers are read.
        memory: Of the device, for example ``24GB``.
        engine: ``vllm``, ``transformers``, or empty for any.
        context: Tokens that the KV cache has room for, at most the model's limit.
        settings: Where hubs are.

    Raises:
        SpecError: when the memory is no size.
        SourceError: when the source cannot be converted.
        PlanError: when nothing fits and is loaded, with what is nearest.
    """
    pinned = pin(source, settings)
    outline = remote_outline(pinned, settings, ExpertStatistics.ALL)
    return recommend_for(pinned.name, outline, memory, engine, context)


def recommend_for(name: str, outline: Outline, memory: str, engine: str, context: int) -> Recommendation:
    """Return which variant of a model to take, as ``recommend``, from its outline."""
    memory_bytes = parse_bytes(memory)
    tokens, cache_bytes = kv_cache(outline.skeleton, context)
    around = cache_bytes + RUNTIME_BYTES
    found = sorted(_candidates(outline, memory, engine, tokens, around), key=lambda item: item.loss)
    eligible = [candidate for candidate in found if candidate.is_eligible]
    if not eligible:
        raise _nothing_fits(name, found, memory_bytes, around, engine)
    size = outline.index.total_bytes
    reasons = tuple(_reasons(eligible[0], found, size, memory_bytes, around))
    return Recommendation(name, size, memory_bytes, tokens, cache_bytes, engine, tuple(found), reasons)


def _candidates(outline: Outline, memory: str, engine: str, context: int, around: int) -> Iterator[Candidate]:
    memory_bytes = parse_bytes(memory)
    for name, loss in LOSSES.items():
        yield _candidate(name, name, loss, outline, memory_bytes, engine, around)
    mix: dict[str, Any] = {"memory": memory, "context": context}
    if engine == Loader.VLLM.value.lower():
        mix["choices"] = list(VLLM_WIDTHS)
    mixed = _candidate(MIXED, {"method": "gptq", "mix": mix}, None, outline, memory_bytes, engine, around)
    if mixed.average_bits != int(mixed.average_bits):  # else there is a variant without a mix that does the same
        yield mixed


def _candidate(
    name: str,
    asked: str | dict[str, Any],
    loss: float | None,
    outline: Outline,
    memory_bytes: int,
    engine: str,
    around: int,
) -> Candidate:
    variant = asked if isinstance(asked, dict) else None
    try:
        spec = VariantSpec.model_validate(asked)
        plan = make_variant_plan(spec, outline)
    except PlanError as error:
        return Candidate(name, variant, 0, 0, 0.0, loss or math.inf, False, error.message)
    size = _size_of(plan, outline)
    average = average_width(_weights_by_width(plan, outline))
    needed = size + around
    obstacle = _obstacle(plan, outline, engine)
    worth = _loss_of(average) if loss is None else loss
    return Candidate(name, variant, size, needed, average, worth, needed <= memory_bytes, obstacle)


def _size_of(plan: VariantPlan, outline: Outline) -> int:
    change = sum(
        packed_bytes(plan.spec, matrix, outline) - outline.tensor_bytes(f"{name}.weight")
        for name, matrix in plan.matrices.items()
    )
    return outline.index.total_bytes + change


def _weights_by_width(plan: VariantPlan, outline: Outline) -> dict[int, int]:
    found: dict[int, int] = {}
    for name, matrix in plan.matrices.items():
        if matrix.scheme is not None:
            bits = matrix.scheme.bits
            found[bits] = found.get(bits, 0) + outline.tensor_elements(f"{name}.weight")
    return found


def _loss_of(average: float) -> float:
    """Return the loss at an average width, between those that were measured, on a logarithmic scale."""
    points = sorted(WIDTH_LOSSES.items())
    bits = min(max(average, points[0][0]), points[-1][0])
    (low, before), (high, after) = next(pair for pair in pairwise(points) if bits <= pair[1][0])
    share = (bits - low) / (high - low)
    return math.exp((1 - share) * math.log(before) + share * math.log(after))


def _obstacle(plan: VariantPlan, outline: Outline, engine: str) -> str:
    """Return why an engine does not load a variant; empty when it does, or none is named and some engine does."""
    known = limits(plan.contents(outline.skeleton.architecture))
    refusals: dict[Loader, str] = {}
    for loader in Loader:
        refused = [limit.text for limit in known if limit.loader is loader and not limit.loads]
        if loader is Loader.VLLM and not refused:
            widths = {matrix.scheme.bits for matrix in plan.matrices.values() if matrix.scheme is not None}
            refused = [refusal] if (refusal := kernel_refusal(plan.spec, widths)) else []
        if refused:
            refusals[loader] = refused[0]
    asked = [loader for loader in Loader if engine in ("", loader.value.lower())]
    return refusals[asked[0]] if all(loader in refusals for loader in asked) else ""


def _reasons(
    best: Candidate, found: Sequence[Candidate], source_bytes: int, memory_bytes: int, around: int
) -> Iterator[str]:
    left = memory_bytes - best.needed_bytes
    yield f"it loses least of those that fit and are loaded, and leaves {format_bytes(left)} for more sequences"
    if source_bytes + around <= memory_bytes:
        yield (
            "the source fits as it is, too: what fewer bits gain is speed, and room. Where prompts are long, w8a8-int8 "
            "or fp8-dynamic should be faster, as engines multiply in 8 bits (not measured)"
        )
    better = [candidate for candidate in found if candidate.loss < best.loss and not candidate.obstacle]
    if better:
        nearest = min(better, key=lambda candidate: candidate.needed_bytes)
        short = nearest.needed_bytes - memory_bytes
        yield f"the next better, {nearest.name}, needs {format_bytes(short)} more"


def _nothing_fits(name: str, found: Sequence[Candidate], memory_bytes: int, around: int, engine: str) -> PlanError:
    loaded = [candidate for candidate in found if candidate.size_bytes and not candidate.obstacle]
    where = f" that {engine} loads" if engine else ""
    if not loaded:
        first = next(candidate for candidate in found if candidate.obstacle)
        return PlanError(
            f"no variant of {name} is known{where}: {first.name}: {first.obstacle}",
            code="plan.recommend",
            hint="name another engine, or none",
        )
    least = min(loaded, key=lambda candidate: candidate.needed_bytes)
    return PlanError(
        f"no variant of {name}{where} fits into {format_bytes(memory_bytes)}: {least.name}, the smallest, has "
        f"{format_bytes(least.size_bytes)} of weights and needs {format_bytes(around)} beside them",
        code="plan.recommend",
        hint=f"take a device with {format_bytes(least.needed_bytes)}, a shorter --context, or several devices",
    )
