"""What one worker needs in memory, from shapes alone: an upper estimate, part by part.

Passing outputs are not in it: beyond a worker's budget they go to disk.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.errors import PlanError
from pipeline.graph.shape import ModelShape
from pipeline.spec import ConversionSpec
from pipeline.units import format_bytes

WORKER_BASE_BYTES = 650_000_000
"""A worker process with torch and transformers imported (measured: 2 cores, torch 2.13.0, `ps -o rss`)."""

HELDOUT_ROWS = 8
"""Held-out sequences whose hidden states a worker has at a time, at most."""


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker needs in memory, in bytes.

    Attributes:
        process: Of itself.
        block: Weights of the largest block in float32, with their stored copy.
        outer: Weights outside the blocks in float32.
        statistics: Of the block with most of them, twice: what there is and what is added.
        tokens: Hidden states of a token slice, and the logits of a held-out sequence of source and variant.
    """

    process: int
    block: int
    outer: int
    statistics: int
    tokens: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.process + self.block + self.outer + self.statistics + self.tokens

    def require(self, max_bytes: int) -> None:
        """Return when a worker with ``max_bytes`` can do.

        Raises:
            PlanError: naming what it needs more for.
        """
        if self.total <= max_bytes:
            return
        parts = ", ".join(f"{format_bytes(size)} {name}" for name, size in asdict(self).items())
        raise PlanError(
            f"a worker needs {format_bytes(self.total)} ({parts}), and --max-memory is {format_bytes(max_bytes)}",
            code="plan.memory",
            hint="give workers more memory; smaller calibration.slice_sequences or shorter sequences need less for "
            "tokens, the rest follows from the model",
        )


def worker_memory(outline: ModelShape, spec: ConversionSpec) -> WorkerMemory:
    """Return what one worker needs for a conversion."""
    blocks = [
        sum(map(outline.tensor_elements, outline.skeleton.block_tensors(block).values()))
        for block in range(outline.skeleton.num_blocks)
    ]
    moments = max(4 * sum(group.in_features**2 for group in block) for block in outline.groups)
    widest = max(group.in_features for block in outline.groups for group in block)
    length = spec.gates.heldout_length
    tokens = max(spec.calibration.slice_sequences * spec.calibration.length, HELDOUT_ROWS * length)
    return WorkerMemory(
        process=WORKER_BASE_BYTES,
        block=6 * max(blocks),
        outer=4 * sum(map(outline.tensor_elements, outline.skeleton.outer_tensors().values())),
        statistics=2 * moments,
        tokens=4 * (3 * tokens * widest + 4 * length * outline.vocabulary_size),
    )
