"""What one worker needs in memory, from shapes alone: an upper estimate, kind of unit by kind of unit.

A worker runs one unit at a time, so it needs what the largest does, besides itself and its shelf, on which outputs wait
for others. The shelf keeps its budget: what does not fit there goes to disk. A unit that sums statistics over a span of
token slices holds several partial sums, so shorter spans need less; nothing else can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from pipeline.calibrate.forward import MICRO_BATCH_TOKENS
from pipeline.errors import PlanError
from pipeline.graph.shape import ModelShape
from pipeline.heap import FREED_BYTES
from pipeline.quantize.solve import TILE_ROWS
from pipeline.skeleton.model import HEAD_PART_ELEMENTS, TABLE_ELEMENTS
from pipeline.spec import ConversionSpec, Method
from pipeline.units import format_bytes
from pipeline.validate.divergence import CHUNK_ELEMENTS

PROCESS_BYTES = 480_000_000
"""A worker process with torch, transformers and Ray imported and a model's skeleton (measured: VmHWM, torch 2.13.0)."""

KEPT_BYTES = FREED_BYTES + 32_000_000
"""Memory that units have freed, and that the process keeps for the next ones, with what comes between two looks."""

SHELF_BYTES = 500_000_000
"""Memory for passing outputs that a worker uses where there is enough."""

FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker needs in memory, in bytes.

    Attributes:
        process: Of itself.
        handing_over: Of the largest sum that other workers get while a unit runs: read back, and in shared memory.
        units: Of the largest unit of each kind.
    """

    process: int
    handing_over: int
    units: Mapping[str, int]

    @property
    def total(self) -> int:
        """What it needs when its shelf is empty."""
        return self.process + self.handing_over + max(self.units.values())

    @property
    def largest(self) -> str:
        """The kind of unit that needs most."""
        return max(self.units, key=lambda kind: self.units[kind])


@dataclass(frozen=True)
class MemoryPlan:
    """How workers keep within their memory.

    Attributes:
        needed: What a worker needs besides its shelf.
        spans: Spans of token slices that calibration is cut into, at least.
        shelf_bytes: Budget of its shelf.
    """

    needed: WorkerMemory
    spans: int
    shelf_bytes: int


def plan_memory(outline: ModelShape, spec: ConversionSpec, workers: int, max_bytes: int | None) -> MemoryPlan:
    """Return how workers keep within ``max_bytes`` of memory each.

    Args:
        outline: The source.
        spec: What to make.
        workers: How many.
        max_bytes: What each may use; None for what it takes, and a shelf of ``SHELF_BYTES``.

    Raises:
        PlanError: when they cannot, naming what needs more.
    """
    num_slices = -(-spec.calibration.samples // spec.calibration.slice_sequences)
    needed = worker_memory(outline, spec, workers)
    if max_bytes is None:
        return MemoryPlan(needed, workers, SHELF_BYTES)
    for spans in [*takewhile(lambda count: count < num_slices, (workers << step for step in range(32))), num_slices]:
        needed = worker_memory(outline, spec, spans)
        if needed.total <= max_bytes:
            return MemoryPlan(needed, spans, min(SHELF_BYTES, max_bytes - needed.total))
    largest = needed.units[needed.largest]
    raise PlanError(
        f"a worker needs {format_bytes(needed.total)}: {format_bytes(needed.process)} for itself, "
        f"{format_bytes(needed.handing_over)} to hand over statistics and {format_bytes(largest)} to {needed.largest}; "
        f"--max-memory is {format_bytes(max_bytes)}",
        code="plan.memory",
        hint=f"give workers at least {format_bytes(needed.total)}; smaller calibration.slice_sequences or shorter "
        "sequences need less for tokens, the rest follows from the model",
    )


def worker_memory(outline: ModelShape, spec: ConversionSpec, spans: int) -> WorkerMemory:
    """Return what one worker needs for a conversion whose calibration is cut into so many spans."""
    block_names = [outline.skeleton.block_tensors(block).values() for block in range(outline.skeleton.num_blocks)]
    stored = max(sum(map(outline.tensor_bytes, names)) for names in block_names)
    dense = FLOAT * max(sum(map(outline.tensor_elements, names)) for names in block_names)
    outer = [(outline.tensor_elements(n), outline.tensor_bytes(n)) for n in outline.skeleton.outer_tensors().values()]
    groups = [(g.in_features, sum(ln.out_features for ln in g.linears)) for block in outline.groups for g in block]
    widest = max(columns for columns, _ in groups)
    moment = FLOAT * widest**2
    moments = max(FLOAT * sum(group.in_features**2 for group in block) for block in outline.groups)
    sequences, length = spec.calibration.slice_sequences, spec.calibration.length
    heldout = spec.gates.heldout_length
    # The widest activations of a few are there at a time: inputs, outputs, and what an activation function makes.
    passing = 4 * FLOAT * max(map(max, groups)) * max(length, min(sequences * length, MICRO_BATCH_TOKENS))
    slices = -(-spec.calibration.samples // sequences)
    partial_sums = 1 + (-(-slices // spans) - 1).bit_length()
    embedding = sum(size + (FLOAT * count if count <= TABLE_ELEMENTS else 0) for count, size in outer)
    embedding += FLOAT * HEAD_PART_ELEMENTS
    # Statistics and factor, the rows of the group, and what is made of a tile of them.
    solve = max(FLOAT * n * (2 * n + rows + 8 * TILE_ROWS["cpu"]) for n, rows in groups)
    search = max(FLOAT * n * (2 * n + 6 * rows) for n, rows in groups)
    units = {
        "embed tokens": embedding + 2 * FLOAT * sequences * length * widest,
        "calibrate on a block": dense + stored // 4 + passing + partial_sums * moments,
        "add up statistics": 3 * moments,
        "solve a linear group": solve,
        "pack a block": 3 * stored,
        "score held-out text": embedding + 8 * FLOAT * CHUNK_ELEMENTS + 2 * FLOAT * heldout * widest,
        "continue prompts": embedding + dense + stored // 4,
    }
    methods = {variant.method for variant in spec.variants}
    if Method.GPTQ in methods:
        units["factor statistics"] = moment + widest**2 * (DOUBLE // 2 + FLOAT) + moment // 4
    if Method.AWQ in methods:
        units["search scales"] = dense + stored + search
    return WorkerMemory(PROCESS_BYTES + KEPT_BYTES, 2 * moment if spans > 1 else 0, units)
