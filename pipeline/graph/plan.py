"""What a conversion would do, from config and safetensors headers alone: no weights are read, nothing is written.

Sizes are exact: they follow from shapes. FLOPs follow from the formulas below. Memory is an upper estimate for one
worker. Time is FLOPs over a rate that is measured for a moment on this machine, so it holds for workers like it.

Per linear [r, n] and T tokens: forward 2 r n T; second moment 2 n^2 T; factorization 4/3 n^3 and column updates r n^2.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.formats.loaders import Contents, Limit, limits
from pipeline.graph.build import VariantPlan, make_variant_plan
from pipeline.graph.outline import Outline, make_outline
from pipeline.hub.source import Source, pin_source, range_reader, read_bytes
from pipeline.quantize.types import Scheme
from pipeline.settings import Settings
from pipeline.spec import PER_CHANNEL, CalibrationSpec, ConversionSpec, Format, Method, VariantSpec
from pipeline.tensors.index import read_index

KV_CACHE_TOKENS = 8192
"""Context of one sequence that the fit table allows for, unless the model's own limit is lower."""

RUNTIME_BYTES = 1_500_000_000
"""What an inference engine takes besides weights and KV cache: code, activations, graphs. A rule of thumb."""

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

WORKER_BASE_BYTES = 650_000_000
"""A worker process with torch and transformers imported (measured: 2 cores, torch 2.13.0, `ps -o rss`)."""

PROBE_SIZE = 768
"""Side of the square float32 product that measures this machine's rate."""


@dataclass(frozen=True)
class MatrixRow:
    """One linear in a variant: what happens with it and what it weighs."""

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
        solve_flops: Scale search and solves.
        notes: Each deviation from the variant's scheme with the number of linears that it concerns.
        cautions: What weakens the result without being a fault.
        limits: What loaders cannot do with it.
        fits: For each device, whether weights, KV cache and runtime fit.
    """

    name: str
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
        worker_bytes: Upper estimate of one worker's memory.
        work_bytes: Upper estimate of the disk that the work directory needs.
        rate: float32 FLOP/s of one thread, measured just now.
        seconds: Estimate of the whole conversion with ``workers`` workers.
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
    work_bytes: int
    workers: int
    rate: float
    seconds: float
    variants: tuple[VariantReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def plan_conversion(spec: ConversionSpec, settings: Settings, workers: int) -> PlanReport:
    """Return what a conversion would do.

    Raises:
        SourceError: when the source cannot be converted.
        PlanError: when a variant cannot be made from it.
    """
    source = pin_source(spec.source, settings)
    outline = remote_outline(source, settings)
    plans = [make_variant_plan(variant, outline) for variant in spec.variants]
    return report_plan(source, outline, plans, spec, workers, measure_rate())


def remote_outline(source: Source, settings: Settings) -> Outline:
    """Return the outline of a source of which only config.json and headers are read."""
    index = read_index(source.file_sizes, range_reader(source, settings))
    folder = Path(tempfile.mkdtemp(prefix="bitmill-plan-"))
    try:
        (folder / "config.json").write_bytes(read_bytes(source, settings, "config.json"))
        return make_outline(folder, index)
    finally:
        shutil.rmtree(folder)


def measure_rate() -> float:
    """Return float32 FLOP/s of a matrix product on one thread of this machine, best of three."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * PROBE_SIZE**3 / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return best


def report_plan(
    source: Source, outline: Outline, plans: list[VariantPlan], spec: ConversionSpec, workers: int, rate: float
) -> PlanReport:
    """Return the report of a plan; a pure function of its arguments."""
    tokens = spec.calibration.samples * spec.calibration.length
    heldout = spec.gates.heldout_samples * spec.gates.heldout_length
    blocks = [_block_elements(outline, block) for block in range(outline.skeleton.num_blocks)]
    head = max(outline.tensor_elements(name) for name in outline.skeleton.outer_tensors().values())
    forward = 2.0 * sum(blocks)
    moments = 2.0 * sum(group.in_features**2 for block in outline.groups for group in block)
    cache_tokens, cache_bytes = kv_cache(outline.config)
    evaluate = heldout * (forward + 4.0 * head)
    variants = tuple(_report_variant(outline, plan, spec.calibration, evaluate, cache_bytes) for plan in plans)
    calibrate = tokens * (forward + moments) + heldout * forward
    flops = calibrate + sum(v.solve_flops + v.evaluate_flops for v in variants)
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
        worker_bytes=_worker_bytes(outline, spec, max(blocks)),
        work_bytes=_work_bytes(outline, spec, variants),
        workers=workers,
        rate=rate,
        seconds=flops / rate / workers,
        variants=variants,
    )


def _block_elements(outline: Outline, block: int) -> int:
    return sum(outline.tensor_elements(name) for name in outline.skeleton.block_tensors(block).values())


def _report_variant(
    outline: Outline, plan: VariantPlan, calibration: CalibrationSpec, evaluate: float, cache_bytes: int
) -> VariantReport:
    rows = tuple(_row(outline, plan.spec, name, plan) for name in plan.matrices)
    quantized = [row for row in rows if row.bits < 16]
    size = outline.index.total_bytes + sum(row.bytes_out - row.bytes_in for row in rows)
    notes: dict[str, int] = {}
    for row in rows:
        if row.note:
            notes[row.note] = notes.get(row.note, 0) + 1
    needed = size + cache_bytes + RUNTIME_BYTES
    return VariantReport(
        name=plan.spec.name,
        format=plan.spec.format.value,
        size_bytes=size,
        num_quantized=len(quantized),
        num_linears=len(rows),
        solve_flops=_solve_flops(outline, plan),
        evaluate_flops=evaluate,
        notes=notes,
        cautions=plan.cautions(calibration),
        limits=limits(_contents(outline, plan)),
        fits={device: needed <= gib * 2**30 for device, gib in DEVICES.items()},
        matrices=rows,
    )


def _contents(outline: Outline, plan: VariantPlan) -> Contents:
    spec = plan.spec
    schemes = {name: matrix.scheme for name, matrix in plan.matrices.items() if matrix.scheme is not None}
    sizes = {PER_CHANNEL if spec.group_size == PER_CHANNEL else scheme.group_size for scheme in schemes.values()}
    architecture = outline.skeleton.architecture
    return Contents(architecture, spec.format, spec.bits, spec.symmetric, frozenset(sizes), tuple(schemes))


def _row(outline: Outline, variant: VariantSpec, name: str, plan: VariantPlan) -> MatrixRow:
    matrix = plan.matrices[name]
    linear, scheme = matrix.linear, matrix.scheme
    before = outline.tensor_bytes(name + ".weight")
    after = (
        before
        if scheme is None
        else packed_bytes(
            variant.format,
            linear.out_features,
            linear.in_features,
            scheme,
            before // (linear.out_features * linear.in_features),
        )
    )
    size, bits = (0, 16) if scheme is None else (scheme.group_size, scheme.bits)
    return MatrixRow(
        name, matrix.block, linear.out_features, linear.in_features, bits, size, matrix.note, before, after
    )


def packed_bytes(format_: Format, out_features: int, in_features: int, scheme: Scheme, scale_bytes: int) -> int:
    """Return the bytes of a quantized linear's tensors in a format.

    Args:
        format_: The format.
        out_features: Rows.
        in_features: Columns.
        scheme: The grid.
        scale_bytes: Bytes of one scale where the format stores them in the source's dtype (at most 2).
    """
    groups, bits = in_features // scheme.group_size, scheme.bits
    match format_:
        case Format.GPTQ:
            codes = in_features * bits // 32 * out_features * 4
            return codes + groups * (out_features * bits // 32) * 4 + groups * out_features * 2 + in_features * 4
        case Format.AWQ:
            return (in_features + groups) * out_features * bits // 8 + groups * out_features * 2
        case Format.COMPRESSED_TENSORS:
            codes = out_features * -(-in_features * bits // 32) * 4
            zeros = 0 if scheme.symmetric else -(-out_features * bits // 32) * 4 * groups
            return codes + zeros + groups * out_features * min(scale_bytes, 2) + 2 * 8


def _solve_flops(outline: Outline, plan: VariantPlan) -> float:
    total = 0.0
    for group in (group for block in outline.groups for group in block):
        if plan.scheme_params(group) is None:
            continue
        rows, width = sum(linear.out_features for linear in group.linears), group.in_features
        match plan.spec.method:
            case Method.GPTQ:
                total += rows * width**2 * 4 + 4 / 3 * width**3
            case Method.AWQ:
                total += 28.0 * min(rows, 512) * width**2 + 4.0 * rows * width**2
            case Method.RTN:
                total += 2.0 * rows * width**2
    return total


def kv_cache(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return tokens and bytes (16 bit) of the KV cache of one sequence, from a model's config.json."""
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    head_dim = config.get("head_dim") or hidden // heads
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    limit = config.get("max_position_embeddings") or config.get("n_positions") or KV_CACHE_TOKENS
    tokens = min(KV_CACHE_TOKENS, limit)
    return tokens, 2 * 2 * layers * kv_heads * head_dim * tokens


def _worker_bytes(outline: Outline, spec: ConversionSpec, block_elements: int) -> int:
    """Weights of one block in float32 with their stored copy, its statistics twice, a token slice with its logits."""
    moments = max(4 * sum(group.in_features**2 for group in block) for block in outline.groups)
    widest = max(group.in_features for block in outline.groups for group in block)
    tokens = max(spec.calibration.slice_sequences * spec.calibration.length, 8 * spec.gates.heldout_length)
    vocabulary = int(outline.config.get("vocab_size", 0))
    outer = sum(outline.tensor_elements(name) for name in outline.skeleton.outer_tensors().values())
    activations = 4 * (3 * tokens * widest + 4 * spec.gates.heldout_length * vocabulary)
    return WORKER_BASE_BYTES + 6 * block_elements + 4 * outer + 2 * moments + activations


def _work_bytes(outline: Outline, spec: ConversionSpec, variants: tuple[VariantReport, ...]) -> int:
    """Statistics of all blocks, hidden states of two, codes (one byte each) and packed files of every variant."""
    moments = sum(4 * group.in_features**2 for block in outline.groups for group in block)
    tokens = spec.calibration.samples * spec.calibration.length + spec.gates.heldout_samples * spec.gates.heldout_length
    hidden = 4 * tokens * max(group.in_features for block in outline.groups for group in block)
    codes = sum(row.out_features * row.in_features for v in variants for row in v.matrices if row.bits < 16)
    return moments + 3 * hidden + codes + sum(variant.size_bytes for variant in variants)
