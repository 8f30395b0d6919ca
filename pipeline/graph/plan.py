"""What a conversion would do, from config and safetensors headers alone: no weights are read, nothing is written.

Sizes are exact: they follow from shapes. FLOPs follow from the formulas below. Memory is an upper estimate for one
worker. Time is that of the real work units in the order in which the driver would run them, at the costs of a reference
worker (``cost.CPU_RATES``).

Per linear [r, n] and T tokens: forward 2 r n T; second moment 2 n^2 T. Solves cost what ``build`` says of their units.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.calibrate.collections import plan_collections
from pipeline.errors import PlanError
from pipeline.facts import UNQUANTIZED_BITS
from pipeline.formats.loaders import Limit, Loader, limits
from pipeline.graph import cost
from pipeline.graph.build import VariantPlan
from pipeline.graph.chains import shape_of
from pipeline.graph.engines import require_loadable
from pipeline.graph.forecast import (
    ClusterRequest,
    Forecast,
    StageRow,
    forecast,
    hourly_price,
    planned_inputs,
    prices_of,
    stage_rows,
)
from pipeline.graph.memory import MemoryPlan, plan_memory
from pipeline.graph.mixed import RUNTIME_BYTES, packed_bytes
from pipeline.graph.naming import ReleaseNames, name_releases
from pipeline.graph.outline import Outline, make_outline
from pipeline.graph.prediction import Cluster
from pipeline.graph.schemes import quantized_part
from pipeline.graph.shape import active_elements
from pipeline.graph.simulate import simulate
from pipeline.graph.sources import pin
from pipeline.hub.source import Source, range_reader, read_bytes
from pipeline.publish.tensor_parallel import kernel_refusal
from pipeline.settings import Settings
from pipeline.skeleton.groups import sequential_steps
from pipeline.skeleton.limits import kv_cache, position_limit
from pipeline.spec import CalibrationSpec, ConversionSpec, ExpertStatistics, Method, Propagate, VariantSpec
from pipeline.tensors.index import read_index

KV_CACHE_TOKENS = 8192
"""Context of one sequence that the fit table allows for, unless the model's own limit is lower."""

DEVICES = {
    "8 GB GPU or laptop": 8,
    "12 GB GPU": 12,
    "16 GB GPU or laptop": 16,
    "24 GB GPU (RTX 4090)": 24,
    "32 GB GPU (RTX 5090)": 32,
    "48 GB GPU (L40S)": 48,
    "80 GB GPU (A100, H100)": 80,
    "141 GB GPU (H200)": 141,
    "8 x 80 GB GPUs": 640,
}
"""Common memory sizes in GiB."""


@dataclass(frozen=True)
class MatrixRow:
    """One linear in a variant: what happens with it and what it weighs. Unquantized ones have 16 bits, whatever the
    source stores them in, and the group size 0."""

    name: str
    block: int
    out_features: int
    in_features: int
    bits: int
    group_size: int
    note: str
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class VariantReport:
    """One variant: its size, its work, what it fits on.

    Attributes:
        release: ``namespace/name`` that it would be published under.
        solve_flops: Scale search and solves.
        notes: Each deviation from the variant's scheme, and what engines refuse, with the number of linears concerned.
        cautions: What weakens the result without being a fault.
        limits: What loaders cannot do with it.
        fits: For each device, whether weights, KV cache and runtime fit.
    """

    name: str
    release: str
    format: str
    size_bytes: int
    num_quantized: int
    num_linears: int
    solve_flops: float
    evaluate_flops: float
    notes: dict[str, int]
    cautions: tuple[str, ...]
    limits: tuple[Limit, ...]
    fits: dict[str, bool]
    matrices: tuple[MatrixRow, ...]


@dataclass(frozen=True)
class PlanReport:
    """What a conversion would do.

    Attributes:
        commit: Hub commit, or empty for a folder, whose digest is only known when its weights are read.
        kv_cache_bytes: For one sequence of ``kv_cache_tokens`` at 16 bit.
        worker_bytes: Upper estimate of one worker's memory, passing outputs not included.
        held_bytes: Most bytes of passing outputs that one worker has; what does not fit into its memory goes to disk.
        work_bytes: Upper estimate of the disk that the work directory needs.
        hardware: What one worker is taken to be.
        seconds: Estimate of the whole conversion with ``workers`` workers.
        bottleneck: What its end waits for longest.
        stages: Time, memory, bytes and price stage by stage.
        price: What the whole conversion would cost; None when the spec has no price of such a worker.
    """

    source: str
    commit: str
    architecture: str
    num_parameters: int
    num_blocks: int
    size_bytes: int
    calibration_tokens: int
    heldout_tokens: int
    calibrate_flops: float
    kv_cache_tokens: int
    kv_cache_bytes: int
    worker_bytes: int
    held_bytes: float
    work_bytes: int
    workers: int
    hardware: str
    seconds: float
    bottleneck: str
    stages: tuple[StageRow, ...]
    price: float | None
    variants: tuple[VariantReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def plan_conversion(
    spec: ConversionSpec,
    settings: Settings,
    workers: int,
    max_memory_bytes: int | None = None,
    requests: Sequence[ClusterRequest] = (),
) -> tuple[PlanReport, tuple[Forecast, ...]]:
    """Return what a conversion would do on this machine, and how it would go on other clusters.

    Args:
        spec: What to make.
        settings: Where hubs are.
        workers: Workers of this machine.
        max_memory_bytes: Memory of each, on other clusters too; None for as much as it takes.
        requests: Other clusters.

    Raises:
        SourceError: when the source cannot be converted.
        SpecError: when a release cannot be called as it would be.
        PlanError: when a variant cannot be made from it, its sequences are longer than the model's, or a worker cannot
            do with its memory.
    """
    source = pin(spec.source, settings)
    names = name_releases(spec, source)
    outline = remote_outline(source, settings, spec.calibration.experts)
    require_positions(spec, outline)
    memory = plan_memory(outline, spec, workers, cost.cost_model("cpu", spec.precision), max_memory_bytes)
    report = report_plan(source, names, outline, spec, workers, memory)
    return report, forecast(outline, spec, requests, max_memory_bytes)


def remote_outline(source: Source, settings: Settings, experts: ExpertStatistics) -> Outline:
    """Return the outline of a source of which only config.json and headers are read."""
    index = read_index(source.file_sizes, range_reader(source, settings))
    with tempfile.TemporaryDirectory(prefix="bitmill-plan-") as temporary:
        # Messages name the folder that config.json is in.
        folder = Path(temporary, source.name.rpartition("/")[2] or "source")
        folder.mkdir()
        (folder / "config.json").write_bytes(read_bytes(source, settings, "config.json"))
        return make_outline(folder, index, experts=experts)


def require_positions(spec: ConversionSpec, outline: Outline, count: Callable[[str], int] | None = None) -> None:
    """Return when no sequence of the conversion is longer than the model's config allows.

    Args:
        spec: What to make.
        outline: The source.
        count: Gives the number of tokens of a prompt as it is continued; without it, a prompt counts as one token.

    Raises:
        PlanError: naming each key that asks for more, its value, and what sets it.
    """
    limit = position_limit(outline.skeleton)
    if limit is None:
        return
    gates = spec.gates
    longest = max(count(item.prompt) if count else 1 for item in gates.prompts)
    asked = {
        "calibration.length": (spec.calibration.length, f"--length {limit.tokens}"),
        "gates.heldout_length": (gates.heldout_length, f"--heldout-length {limit.tokens}"),
        "the longest of gates.prompts with gates.generated_tokens": (
            longest + gates.generated_tokens,
            f"gates: {{generated_tokens: {limit.tokens - longest}}} in a spec file, or shorter prompts",
        ),
    }
    over = {what: (tokens, remedy) for what, (tokens, remedy) in asked.items() if tokens > limit.tokens}
    if over:
        lengths = ", ".join(f"{what} is {tokens}" for what, (tokens, _) in over.items())
        raise PlanError(
            f"sequences are longer than the model's {limit.tokens} positions ({limit.key} in config.json): {lengths}",
            code="plan.positions",
            hint=f"use at most {', '.join(remedy for _, remedy in over.values())}",
        )


def report_plan(
    source: Source, names: ReleaseNames, outline: Outline, spec: ConversionSpec, workers: int, memory: MemoryPlan
) -> PlanReport:
    """Return the report of a plan; a pure function of its arguments.

    Raises:
        PlanError: when a variant cannot be made from the source, or not be loaded by an engine that is demanded.
    """
    inputs = planned_inputs(outline, spec, "cpu")
    for plan in inputs.variants:
        require_loadable(spec.gates.engines, plan.spec.name, plan.contents(outline.skeleton.architecture))
    predicted = simulate(inputs, Cluster(1, workers), tuning=memory.tuning)
    tokens = spec.calibration.samples * spec.calibration.length
    heldout = spec.gates.heldout_samples * spec.gates.heldout_length
    blocks = [_block_elements(outline, block) for block in range(outline.skeleton.num_blocks)]
    head = max(outline.tensor_elements(name) for name in outline.skeleton.outer_tensors().values())
    table = spec.cluster.prices
    hourly = hourly_price(table, "cpu")
    prices = prices_of(table, hourly, predicted, "cpu")
    active = sum(active_elements(outline, block) for block in range(outline.skeleton.num_blocks))
    passed = active if outline.experts is ExpertStatistics.ROUTED else sum(blocks)
    moments = 2.0 * sum(
        width**2 for block in outline.groups for width in plan_collections(block, outline.experts).widths
    )
    cache_tokens, cache_bytes = kv_cache(outline.skeleton, KV_CACHE_TOKENS)
    evaluate = heldout * (2.0 * active + 4.0 * head)
    variants = tuple(
        _report_variant(outline, plan, names, spec.calibration, evaluate, cache_bytes) for plan in inputs.variants
    )
    # Behind quantized blocks text passes the source's block and the variant's own; where both texts are compared, the
    # source's block twice, and there are two moments.
    behind = sum(variant.propagate is not Propagate.FLOAT for variant in spec.variants)
    compared = sum(variant.is_compensated for variant in spec.variants)
    calibrate = tokens * (2.0 * passed + moments) + heldout * 2.0 * active
    calibrate += tokens * (behind * (2.0 * (passed + active) + moments) + compared * (2.0 * passed + moments))
    # Inside a block once more for every step but the first.
    steps = sum(len(sequential_steps(groups)) - 1 for groups in outline.groups) / len(blocks)
    passes = sum(
        2 if variant.is_compensated else 1
        for variant in spec.variants
        if variant.propagate is Propagate.TRUE_SEQUENTIAL
    )
    calibrate += tokens * steps * passes * 2.0 * passed
    return PlanReport(
        source=source.name,
        commit=source.commit or "",
        architecture=outline.skeleton.architecture,
        num_parameters=outline.index.num_parameters,
        num_blocks=len(blocks),
        size_bytes=outline.index.total_bytes,
        calibration_tokens=tokens,
        heldout_tokens=heldout,
        calibrate_flops=calibrate,
        kv_cache_tokens=cache_tokens,
        kv_cache_bytes=cache_bytes,
        worker_bytes=memory.needed.total,
        held_bytes=predicted.held_bytes,
        work_bytes=_work_bytes(outline, spec, variants, 1 + behind + compared),
        workers=workers,
        hardware=predicted.hardware,
        seconds=predicted.seconds,
        bottleneck=predicted.bottleneck,
        stages=stage_rows(predicted, memory.needed, table, hourly),
        price=sum(prices.values()) if prices else None,
        variants=variants,
    )


def _block_elements(outline: Outline, block: int) -> int:
    return sum(outline.tensor_elements(name) for name in outline.skeleton.block_tensors(block).values())


def _report_variant(
    outline: Outline,
    plan: VariantPlan,
    names: ReleaseNames,
    calibration: CalibrationSpec,
    evaluate: float,
    cache_bytes: int,
) -> VariantReport:
    rows = tuple(_row(outline, plan.spec, name, plan) for name in plan.matrices)
    quantized = [row for row in rows if row.group_size]
    size = outline.index.total_bytes + sum(row.bytes_out - row.bytes_in for row in rows)
    notes: dict[str, int] = {}
    for row in rows:
        if row.note:
            notes[row.note] = notes.get(row.note, 0) + 1
    if plan.candidates:
        widths = " or ".join(map(str, plan.candidates))
        notes[f"widths are provisional: conversion measures which of them get {widths} bits"] = len(quantized)
    known = limits(plan.contents(outline.skeleton.architecture))
    # Of files that vLLM does not load at all, the limit already says why.
    is_loaded = all(limit.loads for limit in known if limit.loader is Loader.VLLM)
    if is_loaded and (refusal := kernel_refusal(plan.spec, {row.bits for row in quantized})):
        notes[refusal] = len(quantized)
    needed = size + cache_bytes + RUNTIME_BYTES
    return VariantReport(
        name=plan.spec.name,
        release=names.address(plan.spec.name),
        format=plan.spec.format.value,
        size_bytes=size,
        num_quantized=len(quantized),
        num_linears=len(rows),
        solve_flops=_variant_flops(outline, plan),
        evaluate_flops=evaluate,
        notes=notes,
        cautions=plan.cautions(calibration),
        limits=known,
        fits={device: needed <= gib * 2**30 for device, gib in DEVICES.items()},
        matrices=rows,
    )


def _row(outline: Outline, variant: VariantSpec, name: str, plan: VariantPlan) -> MatrixRow:
    matrix = plan.matrices[name]
    linear, scheme = matrix.linear, matrix.scheme
    rows, columns = linear.out_features, linear.in_features
    before = outline.tensor_bytes(name + ".weight")
    if scheme is None:
        return MatrixRow(name, matrix.block, rows, columns, UNQUANTIZED_BITS, 0, matrix.note, before, before)
    after = packed_bytes(variant, matrix, outline)
    return MatrixRow(name, matrix.block, rows, columns, scheme.bits, scheme.group_size, matrix.note, before, after)


def _variant_flops(outline: Outline, plan: VariantPlan) -> float:
    groups = (group for block in outline.groups for group in block)
    shapes = [shape_of(part) for group in groups if (part := quantized_part(group, plan.matrices)) is not None]
    total = 0.0
    for shape in shapes:
        total += cost.solve_flops(shape) * max(1, len(plan.candidates))
        if plan.spec.method.codes is Method.GPTQ:
            total += cost.factor_flops(shape)
        if plan.spec.method.has_scales:
            total += cost.scale_flops(shape)
    return total


def _work_bytes(
    outline: Outline, spec: ConversionSpec, variants: tuple[VariantReport, ...], num_statistics: int
) -> int:
    """Statistics of all blocks so many times, hidden states of two, codes (one byte each) and packed files of every
    variant."""
    moments = num_statistics * sum(4 * group.in_features**2 for block in outline.groups for group in block)
    tokens = spec.calibration.samples * spec.calibration.length + spec.gates.heldout_samples * spec.gates.heldout_length
    hidden = 4 * tokens * max(group.in_features for block in outline.groups for group in block)
    codes = sum(row.out_features * row.in_features for v in variants for row in v.matrices if row.group_size)
    return moments + 3 * hidden + codes + sum(variant.size_bytes for variant in variants)
