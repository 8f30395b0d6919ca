"""One run of a stage function: what it gets, and where it leaves what it made.

A stage function takes a ``Call`` and returns a summary (JSON values for the record). It reads the source and other
units' outputs, and writes its own with ``Call.put``. A durable output becomes files of the work store: files first,
record last, then one rename, so a unit that is killed leaves nothing that is read and one that runs twice writes the
same bytes. A passing output goes to the worker's shelf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import GraphError, SourceNotFoundError, StorageError
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.outline import Source
from pipeline.graph.shelf import Shelf, Tensors
from pipeline.heap import FREED_BYTES
from pipeline.hub.source import Source as HubSource
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.model import Skeleton
from pipeline.spec import ExpertStatistics
from pipeline.storage.work import StageWriter, WorkStore, missing_file
from pipeline.tensors.local import read_file_tensors
from pipeline.tensors.reader import FileStamp
from pipeline.tensors.writer import write_safetensors

OUTPUT = "output.safetensors"
"""The file that a unit's tensors are in."""

KEPT_COPIES = frozenset({Kind.MERGE, Kind.SCALES})
"""Durable outputs that are read again soon, so that the shelf keeps a copy as long as there is room, and others ask for
it before they read what is stored."""

LOST = "graph.lost_output"
"""Code of the error for a passing output that nobody holds any more."""


@dataclass(frozen=True)
class JobContext:
    """What every work unit of a job needs to know; no part of any key.

    Attributes:
        work_url: Where the work store is; every worker opens it with its own environment.
        source_folder: Folder with the source's files.
        streamed: The source on its hub when its weights are streamed; None when they are in ``source_folder``.
        source_commit: The source's commit, or the fingerprint of its files' digests.
        stamps: What each weights file was when its digest was taken.
        device: ``cpu`` or ``cuda``.
        shelf_bytes: Memory that a worker may hold passing outputs in before it spills them to disk.
        freed_bytes: Freed memory that a worker keeps for what comes next.
        more_freed_bytes: What it may keep besides, by the kind of unit that comes next.
        max_memory_bytes: Memory that a worker may use; None for what it takes.
        experts: Which tokens the statistics of experts are of.
    """

    work_url: str
    source_folder: str
    source_commit: str
    stamps: tuple[tuple[str, FileStamp], ...]
    device: str
    shelf_bytes: int
    streamed: HubSource | None = None
    freed_bytes: int = FREED_BYTES
    more_freed_bytes: Mapping[Kind, int] = field(default_factory=dict)
    max_memory_bytes: int | None = None
    experts: ExpertStatistics = ExpertStatistics.ALL


FetchFrom = Callable[[str, str], Tensors]
"""``fetch(key, prefix)`` gives the tensors whose names start so of the passing output of a unit that another worker
holds; raises ``GraphError`` with the code ``LOST`` when nobody does any more."""


@dataclass
class Call:
    """One run of a stage function.

    Attributes:
        context: The job.
        unit: What to do.
        work: The work store.
        source: The source.
        shelf: The worker's passing outputs.
        fetch: Where to get those of other workers.
        writer: Where a durable output is written; None for a passing one.
        outputs: What ``put`` was given.
        is_written: Whether the output was written already.
    """

    context: JobContext
    unit: WorkUnit
    work: WorkStore
    source: Source
    shelf: Shelf
    fetch: FetchFrom
    writer: StageWriter | None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    is_written: bool = False

    @property
    def params(self) -> Mapping[str, Any]:
        """The unit's arguments."""
        return self.unit.params

    @property
    def skeleton(self) -> Skeleton:
        """The source's skeleton."""
        return self.source.outline.skeleton

    @property
    def group(self) -> LinearGroup:
        """The linear group that the unit works on."""
        position: int = self.params["group"]
        return self.source.outline.groups[self.unit.block][position]

    def needs(self, kind: Kind) -> list[WorkUnit]:
        """Return the units of one kind that this one reads, in order."""
        return [need for need in self.unit.needs if need.kind is kind]

    def need(self, kind: Kind) -> WorkUnit:
        """Return the one unit of a kind that this one reads."""
        (need,) = self.needs(kind)
        return need

    def need_of(self, kind: Kind, position: int) -> WorkUnit | None:
        """Return the unit of a kind that this one reads for the linear group at a position, or None."""
        return next((need for need in self.needs(kind) if need.params["group"] == position), None)

    def get(self, need: WorkUnit, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors of another unit's output whose names start with ``prefix``, on the job's device.

        They are looked for on the shelf, then at the worker that holds them or in the work store (digest checked). They
        may be shared with other units: nobody writes to them.

        Raises:
            StorageError: when a stored output is gone or damaged; it is computed anew then.
            GraphError: with the code ``LOST`` when a passing output is gone.
        """
        found = self.shelf.get(need.key, prefix)
        if found is None:
            found = self._copy(need, prefix) if need.is_durable else self.fetch(need.key, prefix)
        return {name: tensor.to(self.context.device) for name, tensor in found.items() if name.startswith(prefix)}

    def _copy(self, need: WorkUnit, prefix: str) -> Tensors:
        """Return a stored output's tensors: another worker's copy, or what is stored."""
        if need.kind in KEPT_COPIES:
            try:
                return self.fetch(need.key, prefix)
            except GraphError as error:
                if error.code != LOST:
                    raise
        return self.read(need.place, prefix)

    def read(self, place: Stored, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors of a place in the work store whose names start with ``prefix``, its digest checked.

        Raises:
            StorageError: when it is gone or damaged.
        """
        path = self.work.open_checked(*place, OUTPUT)
        try:
            found = read_file_tensors(path, lambda name: name.startswith(prefix))
        except (FileNotFoundError, SourceNotFoundError) as error:
            # Another run has discarded it since the check: saved hidden states are dropped by whoever is done first.
            raise missing_file(*place, OUTPUT, self.work.url) from error
        return {name: tensor.to(self.context.device) for name, tensor in found.items()}

    def summary(self, need: WorkUnit) -> dict[str, Any]:
        """Return the summary of another unit's record.

        Raises:
            StorageError: when its output is gone.
        """
        record = self.work.lookup(*need.place)
        if record is None:
            raise StorageError(
                f"{need.title} is not in {self.work.url} any more",
                code="storage.missing_stage",
                context=need.place._asdict(),
            )
        return record.summary

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors to the unit's output."""
        self.outputs.update(tensors)

    def write(self) -> Path:
        """Write the output of a durable unit, and return the file."""
        assert self.writer is not None, "a passing output is not written"
        self.is_written = True
        return write_output(self.writer, self.outputs)

    def save(self, place: Stored, tensors: Mapping[str, Tensor]) -> None:
        """Fill a place of the work store besides the unit's own output; idempotent."""
        if self.work.lookup(*place) is None:
            with self.work.writing(*place) as writer:
                write_output(writer, tensors)
                writer.finish({})

    def tokens(self) -> Tensor:
        """Return the unit's tokens, int64 [sequences, length], on the job's device."""
        return torch.tensor(self.params["tokens"], dtype=torch.int64, device=self.context.device)


def write_output(writer: StageWriter, tensors: Mapping[str, Tensor]) -> Path:
    """Write the tensors as the output of a stage, and return the file."""
    path = writer.path(OUTPUT)
    write_safetensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {})
    return path
