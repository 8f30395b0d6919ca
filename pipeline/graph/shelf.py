"""What a worker keeps of what it computed: outputs that others will read, in memory up to a budget, then on disk.

The least recently used entry goes first: what can be had elsewhere (a copy of a stored output) is dropped, the rest is
written to a private folder on this machine, which vanishes with the process. Memory is what the entries' tensors take;
on an accelerator they lie in its memory, and what is spilled comes back there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.tensors.local import read_file_tensors
from pipeline.tensors.writer import write_safetensors

Tensors = Mapping[str, Tensor]


@dataclass
class _Entry:
    tensors: Tensors | None
    num_bytes: int
    file: Path | None
    is_copy: bool


class Shelf:
    """Outputs by unit key. Safe to use from several threads.

    Attributes:
        num_spilled: Entries written to disk so far.
    """

    def __init__(self, max_bytes: int, spill_folder: Path, device: str) -> None:
        """Keep up to ``max_bytes`` in memory, the rest under ``spill_folder``, tensors on ``device``."""
        self._max_bytes, self._folder, self._device = max_bytes, spill_folder, device
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
            self._entries[key] = _Entry(tensors, num_bytes, None, is_copy)
            self._in_memory += num_bytes
            self._make_room()

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
        """Return how much of so many bytes of memory is free, after copies were dropped for it."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if entry.is_copy]:
                if self._in_memory + num_bytes <= self._max_bytes:
                    break
                self.drop((key,))
            return max(0, min(num_bytes, self._max_bytes - self._in_memory))

    def _make_room(self) -> None:
        """Drop copies, then spill, oldest first, until the budget is kept: nothing is written to disk for the sake of a
        copy."""
        for is_copy in (True, False):
            for key in list(self._entries):
                if self._in_memory <= self._max_bytes:
                    return
                entry = self._entries[key]
                if entry.tensors is None or entry.is_copy != is_copy:
                    continue
                if is_copy:
                    self.drop((key,))
                else:
                    self._spill(key, entry)

    def _spill(self, key: str, entry: _Entry) -> None:
        assert entry.tensors is not None, "only what is in memory is spilled"
        self._folder.mkdir(parents=True, exist_ok=True)
        entry.file = self._folder / f"{key}.safetensors"
        write_safetensors(entry.file, entry.tensors, {})
        entry.tensors = None
        self._in_memory -= entry.num_bytes
        self.num_spilled += 1
