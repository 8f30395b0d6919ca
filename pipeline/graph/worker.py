"""One worker: runs units one after the other, keeps what they pass on, and hands it to other workers.

Everything that a worker knows can be lost: durable outputs are in the work store, passing ones are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from pipeline import heap
from pipeline.errors import GraphError, PipelineError
from pipeline.graph.dag import WALKS, Kind, WorkUnit
from pipeline.graph.outline import Source, open_folder, open_streamed
from pipeline.graph.parts import Part
from pipeline.graph.shelf import Shelf, Tensors
from pipeline.graph.stages import STAGES
from pipeline.graph.stages.call import KEPT_COPIES, LOST, Call, FetchFrom, JobContext
from pipeline.quantize import kernels as solver_loops
from pipeline.quantize import triton_kernels
from pipeline.settings import load_settings
from pipeline.skeleton.products import prefer_onednn
from pipeline.spec import ExpertStatistics
from pipeline.storage.work import DamagedStage, StageRecord, open_work_store
from pipeline.tensors.reader import FileStamp
from pipeline.validate import kernels as score_loops

THREADS_PER_UNIT = 1
"""Threads of one work unit. More would change the order of summation inside BLAS, hence the bytes."""

SHELF_SHARE = 0.3
"""Share of an accelerator's memory for passing outputs; the rest holds a block and its statistics. Not measured."""

COPY_SHARE = {"cpu": 0.125, "cuda": 0.5}
"""Share of the shelf for copies of stored outputs. Where a store is read as fast as a worker computes, a few do."""


@dataclass(frozen=True)
class Outcome:
    """What a unit came to on a worker.

    Attributes:
        record: What it left in the work store; None when it failed or its output is passing.
        error: Why it failed, or None.
        seconds: Time that it took.
        peak_bytes: Largest resident memory of the worker process so far.
        damaged: Stages of the work store that were found damaged and discarded on the way.
    """

    record: StageRecord | None
    error: PipelineError | None
    seconds: float
    peak_bytes: int
    damaged: tuple[DamagedStage, ...] = ()


@lru_cache(maxsize=2)
def open_source(
    folder: str, commit: str, stamps: tuple[tuple[str, FileStamp], ...], device: str, experts: ExpertStatistics
) -> Source:
    """Return the source in ``folder`` at ``commit``; headers and config are read once per process and commit."""
    return open_folder(Path(folder), device, dict(stamps), experts)


class Worker:
    """Runs units of one job in this process.

    Attributes:
        shelf: What its units passed on.
    """

    def __init__(self, context: JobContext, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing but the job's context; the source is opened before the first unit asks for it.

        That loads the model's class, and compiled loops, and takes seconds, which are the start's and not a unit's:
        units are timed, and whoever watches is told of workers once they can work.

        Raises:
            QuantizationError: when it is to compute on a GPU and lacks the loops for one: no solve would succeed.
        """
        if context.device == "cuda":
            triton_kernels.load()
        self._context, self._clock = context, clock
        self._work = open_work_store(context.work_url, load_settings())
        self._stack = ExitStack()
        self._streamed: Source | None = None
        # Vanishes with this process, however it ends: the next run sweeps what dead ones left.
        spill = self._stack.enter_context(self._work.private_folder())
        budget = _shelf_bytes(context)
        copies = int(COPY_SHARE[context.device] * budget)
        self.shelf = Shelf(budget, spill, context.device, copies, _spare_of_peak if context.device == "cpu" else None)
        with suppress(PipelineError):  # the first unit says it, as an outcome
            self._source()
        if context.device == "cpu":
            solver_loops.load()
            score_loops.load()
        heap.drop_code()
        self._kept_bytes = heap.private_bytes() + context.freed_bytes

    def run(self, unit: WorkUnit, fetch: FetchFrom) -> Outcome:
        """Run a unit and return what it came to; what other workers hold comes through ``fetch``.

        A durable unit that is finished already is not run again. Errors of ours are values in the outcome: Ray would
        wrap them.
        """
        start = self._clock()
        # Before a unit and not after it: how much may be kept is a question of what it needs itself.
        more_bytes = self._context.more_freed_bytes.get(unit.kind, 0)
        if heap.private_bytes() > self._kept_bytes + self.shelf.memory_bytes + more_bytes:
            heap.give_back()
        record, error = None, None
        try:
            record = self._run(unit, fetch)
        except PipelineError as caught:
            error = caught
        except (MemoryError, RuntimeError) as caught:
            if not heap.is_lack_of_memory(caught):
                raise
            error = GraphError(f"{unit.title} ran out of memory: {caught}", code="graph.out_of_memory")
        if error is not None:
            heap.give_back()  # what it was the lack of, perhaps
        heap.drop_shared(heap.SHARED_BYTES)
        damaged = tuple(self._work.take_damaged())
        return Outcome(record, error, self._clock() - start, heap.peak_bytes(), damaged)

    def hand_over(self, key: str, prefix: str, number: int) -> Part:
        """Return of an output on this worker's shelf a part of the tensors whose names start so.

        Raises:
            GraphError: with the code ``LOST`` when it is not there.
        """
        heap.drop_shared(heap.SHARED_BYTES)
        part = self.shelf.part(key, prefix, number)
        if part is None:
            raise lost_output(key)
        return part

    def forget(self, keys: Iterable[str]) -> None:
        """Drop passing outputs that nobody reads any more."""
        self.shelf.drop(keys)

    def close(self) -> None:
        """Remove what was spilled, and stop reading ahead."""
        self._stack.close()

    def _source(self) -> Source:
        """Return the source; one that is streamed is this worker's own, as it writes to its work store."""
        context = self._context
        if context.streamed is None:
            place = context.source_folder, context.source_commit, context.stamps
            return open_source(*place, context.device, context.experts)
        if self._streamed is None:
            settings, experts = load_settings(), context.experts
            self._streamed = open_streamed(context.streamed, settings, self._work, context.device, experts)
            self._stack.callback(self._streamed.close)
        return self._streamed

    def _run(self, unit: WorkUnit, fetch: FetchFrom) -> StageRecord | None:
        torch.set_num_threads(THREADS_PER_UNIT)
        prefer_onednn()
        context, place = self._context, unit.place
        if unit.is_durable and (known := self._work.lookup(*place)) is not None:
            return known
        source = self._source()
        if unit.kind in WALKS and not (unit.kind is Kind.FORWARD and unit.variant):
            source.expect_block(unit.block + 1)  # one that reads it follows
        with ExitStack() as stack:
            writer = stack.enter_context(self._work.writing(*place)) if unit.is_durable else None
            call = Call(context, unit, self._work, source, self.shelf, fetch, writer)
            summary = STAGES[unit.kind](call)
            if writer is None:
                self.shelf.put(unit.key, call.outputs)
                return None
            if call.outputs and not call.is_written:
                call.write()
            record = writer.finish(summary)
        if unit.kind in KEPT_COPIES:
            self.shelf.put(unit.key, call.outputs, is_copy=True)
        return record


def _spare_of_peak(wanted_bytes: int) -> int:
    """Return how much of so many bytes this process can take in without taking more than it has had."""
    if heap.peak_bytes() - heap.resident_bytes() < wanted_bytes:
        heap.give_back()
    return max(0, min(wanted_bytes, heap.peak_bytes() - heap.resident_bytes()))


def _shelf_bytes(context: JobContext) -> int:
    """Return the shelf's budget: the job's, and on an accelerator a share of its memory when that is more and nobody
    has said what a worker may use."""
    if context.device == "cpu" or context.max_memory_bytes is not None:
        return context.shelf_bytes
    total: int = torch.cuda.get_device_properties(0).total_memory
    return max(context.shelf_bytes, int(SHELF_SHARE * total))


def lost_output(key: str) -> GraphError:
    """Return the error for a passing output that nobody holds any more; it is computed again."""
    return GraphError(f"the output {key[:12]} is held by no worker any more", code=LOST, context={"key": key})


def nobody_holds(key: str, prefix: str) -> Tensors:
    """Stand in for other workers where there are none.

    Raises:
        GraphError: always.
    """
    raise lost_output(key)
