"""Copies of files on this machine, bounded, shared by all its processes.

A name stands for one content for ever, so an entry that is there need not be looked up elsewhere; that its bytes are
still the right ones is for the reader to check. An entry appears whole or not at all. When the entries take more than
the bound, those that were not used for longest go, but none that was used within ``GRACE_S``: who was given a path has
that long to open it. So the bound may be passed by what a minute brings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.disk import disk_errors, make_folders
from pipeline.storage.temporaries import Temporaries, exclusive_lock

MAX_BYTES = 16_000_000_000
"""Disk for the copies of one cache."""

GRACE_S = 60.0
"""Seconds after its last use in which an entry stays."""

_PRIVATE_FOLDER = ".tmp"
_CHECKS_PER_BOUND = 32
"""How often entries are counted while as much is added as the bound allows."""


class FileCache:
    """Files by name under one folder. Safe to use from several processes and threads.

    Attributes:
        folder: Where the files are.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = MAX_BYTES,
        *,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep up to ``max_bytes`` under ``folder``, which is made when something is added."""
        self.folder = folder.expanduser().absolute()
        self._max_bytes, self._grace_s, self._clock = max_bytes, grace_s, clock
        self._temporaries = Temporaries(self.folder / _PRIVATE_FOLDER)
        self._uncounted = max_bytes  # what earlier processes left is counted at the first addition

    def find(self, name: str) -> Path | None:
        """Return the path of an entry, which counts as used now, or None.

        Args:
            name: At least three characters that a file's name may have.
        """
        path = self._path(name)
        with self.errors():
            try:
                # The access time is ours to keep: file systems are mounted without it.
                os.utime(path, ns=(int(self._clock() * 1e9), path.stat().st_mtime_ns))
            except FileNotFoundError:
                return None
        return path

    def add(self, name: str, file: Path) -> Path:
        """Make a file on the same disk (for example below `private_folder`) the entry; return its new path."""
        path = self._path(name)
        with self.errors():
            size_bytes = file.stat().st_size
            make_folders(path.parent)
            os.utime(file, ns=(int(self._clock() * 1e9), file.stat().st_mtime_ns))
            file.replace(path)
            self._uncounted += size_bytes
            if self._uncounted * _CHECKS_PER_BOUND >= self._max_bytes:
                self._make_room()
        return path

    def drop(self, name: str) -> None:
        """The entry is gone."""
        with self.errors():
            self._path(name).unlink(missing_ok=True)

    @contextmanager
    def private_folder(self) -> Iterator[Path]:
        """Give the path of a folder for one process alone, on the cache's disk; `sweep` removes it when the process is
        dead."""
        with ExitStack() as stack:
            with self.errors():
                make_folders(self._temporaries.folder)
                folder = stack.enter_context(self._temporaries.claim())
                folder.mkdir()
            yield folder

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let one process or thread of this machine at a time make an entry, so that the others find it."""
        with self.errors():
            make_folders(self._temporaries.folder)
        # A few locks for all names: they stay behind, and two names that share one only wait for each other.
        with exclusive_lock(self._temporaries.folder / f"making-{name[:2]}"):
            yield

    def sweep(self) -> tuple[str, ...]:
        """Remove the private folders of dead processes, and return their names."""
        with self.errors():
            return self._temporaries.sweep()

    def errors(self, *, only_full: bool = False) -> AbstractContextManager[None]:
        """Turn OSErrors of a block, or only those of a full disk, into StorageErrors that name the cache."""
        return disk_errors(
            f"the cache {self.folder}",
            hint="free some space there, or set BITMILL_CACHE to a larger disk; finished work is kept",
            only_full=only_full,
        )

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _make_room(self) -> None:
        self._uncounted = 0
        entries = []
        for folder in self.folder.glob("[!.]*"):
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):  # another process made room for it
                    facts = entry.stat()
                    entries.append((facts.st_atime, facts.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for used_s, size, path in sorted(entries):
            if excess <= 0 or used_s > self._clock() - self._grace_s:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size
