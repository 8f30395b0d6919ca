"""What a worker keeps of what it computed: outputs that others will read, in memory up to a budget, then on disk.

The least recently used entry goes first: what can be had elsewhere (a copy of a stored output) is dropped, and beyond a
budget of its own even where there is room; the rest is written to a private folder on this machine, which vanishes with
the process. Memory is what the entries' tensors take; on an accelerator they lie in its memory, and what is spilled
comes back there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.graph.parts import PART_BYTES, Part, cut_rows, make_part, take_rows
from pipeline.tensors.local import read_file_rows, read_file_tensors
from pipeline.tensors.writer import write_safetensors

Tensors = Mapping[str, Tensor]


@dataclass
class _Entry:
    outlines: Tensors
    tensors: Tensors | None
    num_bytes: int
    file: Path | None
    is_copy: bool
    is_kept: bool = False


class Shelf:
    """Outputs by unit key. Safe to use from several threads.

    Attributes:
        num_spilled: Entries written to disk so far.
    """

    def __init__(
        self,
        max_bytes: int,
        spill_folder: Path,
        device: str,
        max_copy_bytes: int | None = None,
        spare_bytes: Callable[[int], int] | None = None,
    ) -> None:
        """Keep outputs in memory up to a budget.

        Args:
            max_bytes: The budget.
            spill_folder: Where the rest goes.
            device: Where tensors are.
            max_copy_bytes: Budget of copies within it; default: as much as there is room.
            spare_bytes: How much of so many bytes may be taken for what is only kept to be read faster; default: as
                much as there is room.
        """
        self._max_bytes, self._folder, self._device = max_bytes, spill_folder, device
        self._spare_bytes = spare_bytes or (lambda wanted_bytes: wanted_bytes)
        self._max_copy_bytes = max_bytes if max_copy_bytes is None else max_copy_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._in_memory = 0
        self._lock = threading.RLock()
        self.num_spilled = 0

    @property
    def memory_bytes(self) -> int:
        """What the entries in memory take."""
        return self._in_memory

    def put(self, key: str, tensors: Tensors, *, is_copy: bool = False) -> None:
        """Keep a unit's output.

        Args:
            key: Key of the unit.
            tensors: Its tensors by name; they belong to the shelf now.
            is_copy: Whether the same can be read from the work store, so that it may be dropped.

        Raises:
            DiskFullError: when it has to be spilled and the disk is full.
        """
        with self._lock:
            self.drop((key,))
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            self._entries[key] = _Entry(_outlines(tensors), tensors, num_bytes, None, is_copy)
            self._in_memory += num_bytes
            self._make_room()

    def keep(self, key: str, tensors: Tensors) -> None:
        """Keep what can be had elsewhere too and is read in turns, such as the blocks of a model for every token: only
        where there is room, as the one that was read longest ago is read next. Other copies go for it.

        Args:
            key: What it is.
            tensors: Its tensors by name; they belong to the shelf now.
        """
        with self._lock:
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            if self.make_room_for(num_bytes) == num_bytes:
                self._entries[key] = _Entry(_outlines(tensors), tensors, num_bytes, None, is_copy=True, is_kept=True)
                self._in_memory += num_bytes

    def get(self, key: str, prefix: str = "") -> Tensors | None:
        """Return of a unit's output the tensors whose names start with ``prefix``, or None when it is not here; of what
        is on disk only these are read."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            if entry.tensors is not None:
                return {name: tensor for name, tensor in entry.tensors.items() if name.startswith(prefix)}
            assert entry.file is not None, "an entry is in memory or in a file"
            found = read_file_tensors(entry.file, lambda name: name.startswith(prefix))
            return {name: tensor.to(self._device) for name, tensor in found.items()}

    def part(self, key: str, prefix: str, number: int) -> Part | None:
        """Return a part of those tensors of a unit's output whose names start with ``prefix``, in CPU memory, or None
        when the output is not here; of what is on disk only the part is read."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            wanted = {name: outline for name, outline in entry.outlines.items() if name.startswith(prefix)}
            parts = cut_rows(wanted, PART_BYTES)
            ranges = parts[number]
            if entry.tensors is not None:
                found = {name: take_rows(entry.tensors[name], rows).cpu() for name, rows in ranges.items()}
            else:
                assert entry.file is not None, "an entry is in memory or in a file"
                found = read_file_rows(entry.file, ranges)
            return make_part(wanted, found, ranges, len(parts))

    def drop(self, keys: Iterable[str]) -> None:
        """Forget outputs; those that are not here are forgotten already."""
        with self._lock:
            for key in keys:
                entry = self._entries.pop(key, None)
                if entry is None:
                    continue
                if entry.tensors is not None:
                    self._in_memory -= entry.num_bytes
                if entry.file is not None:
                    entry.file.unlink(missing_ok=True)

    def make_room_for(self, num_bytes: int) -> int:
        """Return how much of so many bytes of memory may be taken for what is read in turns, after copies were dropped
        for it that are not kept."""
        with self._lock:
            num_bytes = self._spare_bytes(num_bytes)
            for key in [key for key, entry in self._entries.items() if entry.is_copy and not entry.is_kept]:
                if self._in_memory + num_bytes <= self._max_bytes:
                    break
                self.drop((key,))
            return max(0, min(num_bytes, self._max_bytes - self._in_memory))

    def _make_room(self) -> None:
        """Drop copies, then spill, oldest first, until the budget is kept: nothing is written to disk for the sake of a
        copy."""
        copies = [key for key, entry in self._entries.items() if entry.is_copy and not entry.is_kept]
        copied = sum(self._entries[key].num_bytes for key in copies)
        for key in copies:
            if self._in_memory <= self._max_bytes and copied <= self._max_copy_bytes:
                break
            copied -= self._entries[key].num_bytes
            self.drop((key,))
        kept = [key for key, entry in self._entries.items() if entry.is_kept]
        while kept and self._in_memory > self._max_bytes:
            self.drop((kept.pop(),))
        for key, entry in list(self._entries.items()):
            if self._in_memory <= self._max_bytes:
                return
            if entry.tensors is not None and not entry.is_copy:
                self._spill(key, entry)

    def _spill(self, key: str, entry: _Entry) -> None:
        assert entry.tensors is not None, "only what is in memory is spilled"
        self._folder.mkdir(parents=True, exist_ok=True)
        entry.file = self._folder / f"{key}.safetensors"
        write_safetensors(entry.file, entry.tensors, {})
        entry.tensors = None
        self._in_memory -= entry.num_bytes
        self.num_spilled += 1


def _outlines(tensors: Tensors) -> Tensors:
    """Return tensors of the same shapes and dtypes without content."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}
