"""What one worker needs in memory, from shapes alone: an upper estimate, kind of unit by kind of unit.

A worker runs one unit at a time, so it needs what the largest does, besides itself and its shelf, on which outputs wait
for others. The shelf keeps its budget: what does not fit there goes to disk. A unit that passes a span of token slices
through a block holds the hidden states of all of them, and several partial sums, so shorter spans need less; nothing
else can be cut. Estimates are of the spans that a ``Tuning`` makes, and the job is cut by the same ``Tuning``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.calibrate.collections import plan_collections
from pipeline.calibrate.forward import MICRO_BATCH_TOKENS
from pipeline.calibrate.sensitivity import LOGIT_ELEMENTS
from pipeline.errors import PlanError
from pipeline.graph.chains import HELDOUT_SLICE_SEQUENCES, Span, cut, cut_to_sum
from pipeline.graph.cost import CostModel, GroupShape, solve_bytes
from pipeline.graph.dag import WALKS, Kind
from pipeline.graph.folds import MAX_SEARCHED_ROWS
from pipeline.graph.mixed import SENSED_SEQUENCES
from pipeline.graph.parts import PART_BYTES
from pipeline.graph.shape import ModelShape, state_size
from pipeline.graph.tuning import Tuning, make_tuning
from pipeline.heap import FREED_BYTES, LEAST_FREED_BYTES
from pipeline.quantize.solve import TILE_ROWS
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.tables import HEAD_PART_ELEMENTS, TABLE_ELEMENTS
from pipeline.spec import ConversionSpec, Method, Propagate
from pipeline.units import format_bytes
from pipeline.validate.divergence import CHUNK_ELEMENTS

PROCESS_BYTES = 530_000_000
"""A worker process with torch, transformers, numba and Ray imported and a model's skeleton: 400 MB at its peak (VmHWM,
torch 2.13.0, 2026-11-25), and 130 MB where it has to compile the loops first; where they are loaded they take 40 MB."""

PARTS_AT_ONCE = 4
"""Parts of outputs in a worker's memory: one that it hands over, read back and in shared memory, one that it is handed,
and what it keeps of shared memory."""

UNSEEN_BYTES = 32_000_000
"""Freed memory that comes to what a process keeps between two looks at it."""

SHELF_BYTES = 500_000_000
"""Memory for passing outputs that a worker uses where there is enough."""

FLOAT, DOUBLE = 4, 8

UNITS_OF: dict[Kind, str] = {
    Kind.EMBED: "embed tokens",
    Kind.CALIBRATE: "calibrate on a block",
    Kind.COMPARE: "compare a block's inputs",
    Kind.PROPAGATE: "pass calibration text",
    Kind.FORWARD: "pass held-out text",
    Kind.ADD: "add up statistics",
    Kind.MERGE: "add up statistics",
    Kind.COMPENSATE: "find compensations",
    Kind.FACTOR: "factor statistics",
    Kind.SENSE: "measure sensitivity",
    Kind.SCALES: "search scales",
    Kind.SOLVE: "solve a linear group",
    Kind.PACK: "pack a block",
    Kind.SCORE: "score held-out text",
    Kind.CONTINUE: "continue prompts",
    Kind.GENERATE: "continue prompts",
}
"""What units of a kind do, as ``WorkerMemory.units`` and messages call it; the others stream what they handle."""


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker needs in memory, in bytes.

    Attributes:
        process: Of itself.
        handing_over: Of what passes from one worker to another while a unit runs.
        units: Of the largest unit of each kind.
    """

    process: int
    handing_over: int
    units: Mapping[str, int]

    @property
    def total(self) -> int:
        """What it needs when its shelf is empty."""
        return self.process + self.handing_over + max(self.units.values())

    def of(self, kind: Kind) -> int:
        """Return what it needs while it runs units of a kind; 0 for those that need next to nothing."""
        own = self.units.get(UNITS_OF.get(kind, ""))
        return self.process + self.handing_over + own if own is not None else 0

    @property
    def largest(self) -> str:
        """The kind of unit that needs most."""
        return max(self.units, key=lambda kind: self.units[kind])


@dataclass(frozen=True)
class MemoryPlan:
    """How workers keep within their memory.

    Attributes:
        needed: What a worker needs besides its shelf.
        tuning: How the job is cut.
        shelf_bytes: Budget of its shelf.
        freed_bytes: Freed memory that it keeps in any case.
    """

    needed: WorkerMemory
    tuning: Tuning
    shelf_bytes: int
    freed_bytes: int

    @property
    def more_freed_bytes(self) -> dict[Kind, int]:
        """Freed memory that a worker may keep besides, by the kind of unit that it runs: what that needs less than the
        largest, which is there anyway. A unit that passes a block takes what the one before it has freed, so more than
        twice what these need would only lie there."""
        walks = (self.needed.units.get(UNITS_OF[kind], 0) for kind in WALKS - {Kind.EMBED})
        most = max(0, 2 * max(walks) - self.freed_bytes)
        largest = max(self.needed.units.values())
        return {kind: min(most, largest - self.needed.units.get(UNITS_OF.get(kind, ""), 0)) for kind in Kind}

    @property
    def least_bytes(self) -> int:
        """What a worker needs when its shelf is empty and it keeps as little of what it has freed as it can."""
        return self.needed.total - self.freed_bytes + LEAST_FREED_BYTES


@dataclass(frozen=True)
class _Passed:
    """A text that passes the blocks, as far as memory goes.

    Attributes:
        slice_tokens: Tokens of a slice.
        batch_tokens: Of these, what passes a block at a time.
        slices: Slices of the longest span.
    """

    slice_tokens: int
    batch_tokens: int
    slices: int

    @classmethod
    def of(cls, samples: int, length: int, sequences: int, spans: Sequence[Span]) -> _Passed:
        """Return a text of ``samples`` sequences in slices of ``sequences``, cut into ``spans``."""
        low, high = spans[0]
        sequences = min(sequences, samples)
        batch_tokens = max(length, min(sequences * length, MICRO_BATCH_TOKENS))
        return cls(sequences * length, batch_tokens, high - low)

    @property
    def span_tokens(self) -> int:
        """Tokens of the longest span."""
        return self.slices * self.slice_tokens

    @property
    def partial_sums(self) -> int:
        """Sums that are there at a time: one for each level of the tree, and the slice's own."""
        return 1 + (self.slices - 1).bit_length()


def plan_memory(
    outline: ModelShape, spec: ConversionSpec, workers: int, costs: CostModel, max_bytes: int | None
) -> MemoryPlan:
    """Return how workers keep within ``max_bytes`` of memory each.

    Args:
        outline: The source.
        spec: What to make.
        workers: How many.
        costs: What units cost: as long as there is memory for it, a job is cut as is soonest done.
        max_bytes: What each may use; None for what it takes, with a shelf of ``SHELF_BYTES``.

    Raises:
        PlanError: when they cannot, naming what needs more.
    """
    tuning = make_tuning(outline, spec, workers, costs)
    needed = worker_memory(outline, spec, tuning)
    most = SHELF_BYTES + FREED_BYTES - LEAST_FREED_BYTES
    while max_bytes is not None and needed.total > max_bytes:
        for shorter in (
            replace(tuning, spans=2 * tuning.spans),
            replace(tuning, heldout_spans=2 * tuning.heldout_spans),
            tuning.with_shorter_spans(),
        ):
            less = worker_memory(outline, spec, shorter)
            if less.total < needed.total:
                tuning, needed = shorter, less
                break
        else:
            raise _too_little(needed, max_bytes)
    spare = most if max_bytes is None else min(most, max_bytes - needed.total)
    shelf_bytes = min(SHELF_BYTES, spare)
    more_bytes = spare - shelf_bytes
    needed = replace(needed, process=needed.process + more_bytes)
    return MemoryPlan(needed, tuning, shelf_bytes, LEAST_FREED_BYTES + more_bytes)


def _too_little(needed: WorkerMemory, max_bytes: int) -> PlanError:
    largest = needed.units[needed.largest]
    return PlanError(
        f"a worker needs {format_bytes(needed.total)}: {format_bytes(needed.process)} for itself, "
        f"{format_bytes(needed.handing_over)} to hand over statistics and {format_bytes(largest)} to {needed.largest}; "
        f"--max-memory is {format_bytes(max_bytes)}",
        code="plan.memory",
        hint=f"give workers at least {format_bytes(needed.total)}; smaller calibration.slice_sequences or shorter "
        "sequences need less for tokens, the rest follows from the model",
    )


def worker_memory(outline: ModelShape, spec: ConversionSpec, tuning: Tuning) -> WorkerMemory:
    """Return what one worker needs at least for a conversion that is cut so."""
    own, gates = spec.calibration, spec.gates
    sequences = own.sequences_in_slice
    spans = cut_to_sum(-(-own.samples // sequences), tuning.spans)
    calibration = _Passed.of(own.samples, own.length, sequences, spans)
    spans = cut(-(-gates.heldout_samples // HELDOUT_SLICE_SEQUENCES), tuning.heldout_spans)
    heldout = _Passed.of(gates.heldout_samples, gates.heldout_length, HELDOUT_SLICE_SEQUENCES, spans)
    block_names = [outline.skeleton.block_tensors(block).values() for block in range(outline.skeleton.num_blocks)]
    stored = max(sum(map(outline.tensor_bytes, names)) for names in block_names)
    dense = FLOAT * max(sum(map(outline.tensor_elements, names)) for names in block_names)
    outer = [(outline.tensor_elements(n), outline.tensor_bytes(n)) for n in outline.skeleton.outer_tensors().values()]
    groups = [(g.in_features, sum(ln.out_features for ln in g.linears)) for block in outline.groups for g in block]
    widest = max(columns for columns, _ in groups)
    # Experts and what else shares an input with others is computed one module after the other.
    at_once = max(max(g.in_features, _widest_module(g)) for block in outline.groups for g in block)
    moment = FLOAT * widest**2
    collections = [plan_collections(block, outline.experts) for block in outline.groups]
    moments = max(FLOAT * sum(width**2 for width in items.widths) for items in collections)
    hidden = FLOAT * state_size(outline)

    def passing(text: _Passed) -> int:
        """What passes a block needs: the widest activations of a few are there at a time (inputs, outputs, and what an
        activation function makes), what has left the block, what has yet to enter it, and a slice on its way, whole and
        in parts."""
        activations = 4 * FLOAT * at_once * text.batch_tokens
        return activations + hidden * (text.span_tokens + 2 * text.slice_tokens)

    embedding = sum(size + (FLOAT * count if count <= TABLE_ELEMENTS else 0) for count, size in outer)
    embedding += FLOAT * HEAD_PART_ELEMENTS
    # Statistics and factor, the rows of the group, and what is made of a tile of them.
    refined = 6 if any(variant.refinement for variant in spec.variants) else 0
    tile = (8 + refined) * TILE_ROWS["cpu"]
    # Groups that are solved together take in no more than the largest alone.
    solve = max(int(solve_bytes(GroupShape(rows, n))) for n, rows in groups) + FLOAT * widest * tile
    search = max(FLOAT * n * (2 * n + 6 * min(rows, MAX_SEARCHED_ROWS)) for n, rows in groups)
    units = {
        "embed tokens": embedding
        + hidden * max(text.span_tokens + text.slice_tokens for text in (calibration, heldout)),
        "calibrate on a block": dense + stored // 4 + passing(calibration) + calibration.partial_sums * moments,
        "pass held-out text": dense + stored // 4 + passing(heldout),
        "add up statistics": 3 * moments,
        "solve a linear group": solve,
        "pack a block": 3 * stored,
        "score held-out text": embedding + 8 * FLOAT * CHUNK_ELEMENTS + 2 * hidden * heldout.slice_tokens,
        "continue prompts": embedding + dense + stored // 4,
    }
    mixes = [variant.mix for variant in spec.variants if variant.mix is not None]
    if mixes:
        # All that a block computes for one sequence is kept until it is passed back, attention included; and what
        # entered every block.
        most = min(SENSED_SEQUENCES, max(mix.samples for mix in mixes))
        widths = sum(columns + rows for columns, rows in groups) / len(block_names)
        kept = FLOAT * 3 * int(widths) * own.length + 2 * hidden * own.length * most * len(block_names)
        units["measure sensitivity"] = embedding + dense + stored // 4 + kept + 4 * FLOAT * LOGIT_ELEMENTS
    if any(variant.propagate is not Propagate.FLOAT for variant in spec.variants):
        units["pass calibration text"] = dense + stored // 4 + passing(calibration)
    if any(variant.is_compensated for variant in spec.variants):
        # Hidden states of both, what the block's linears read in the source, and twice the sums.
        both = passing(calibration) + hidden * (calibration.span_tokens + 2 * calibration.slice_tokens)
        read = max(FLOAT * sum(items.widths) for items in collections) * calibration.batch_tokens
        sums = 2 * calibration.partial_sums * moments
        units["compare a block's inputs"] = dense + stored // 4 + both + read + sums
        units["add up statistics"] = 6 * moments
        units["find compensations"] = 3 * moment + 3 * widest**2 * DOUBLE
        units["solve a linear group"] = solve + moment
    if any(variant.propagate is Propagate.TRUE_SEQUENTIAL for variant in spec.variants):
        # The linears that are quantized already, besides their codes.
        for kind in ("calibrate on a block", "compare a block's inputs"):
            units[kind] = units.get(kind, 0) + dense + dense // FLOAT
    methods = {variant.method for variant in spec.variants}
    if any(method.codes is Method.GPTQ for method in methods):
        units["factor statistics"] = moment + widest**2 * (DOUBLE // 2 + FLOAT) + moment // 4
    if any(method.has_scales for method in methods):
        units["search scales"] = dense + stored + search
    handing_over = PARTS_AT_ONCE * min(moment, PART_BYTES)
    process = PROCESS_BYTES + LEAST_FREED_BYTES + UNSEEN_BYTES
    return WorkerMemory(process, handing_over if tuning.workers > 1 else 0, units)


def _widest_module(group: LinearGroup) -> int:
    """Return the most rows that the members of one module have together."""
    rows: dict[str, int] = {}
    for linear in group.linears:
        owner = linear.local_name.rpartition(".")[0]
        rows[owner] = rows.get(owner, 0) + linear.out_features
    return max(rows.values())
