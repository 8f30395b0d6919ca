"""Locks on a file system, and private temporaries that vanish with their writer.

A temporary belongs to a living writer as long as the writer holds the flock on its ``.lock`` file. The kernel lets go
of the lock when the process ends, however it ends, so a sweep can tell leftovers from work in progress without
trusting process ids (which are reused, and mean nothing on another machine) or ages.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.disk import disk_errors, make_folders


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the flock on a file, which is created and stays; threads and processes exclude each other alike."""
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Temporaries:
    """Private paths under one folder that vanish with their writer.

    Attributes:
        folder: Where they are; on the file system of their destination, so that a rename is atomic.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def claim(self) -> Iterator[Path]:
        """Give a path nobody else uses. What is still there at the end of the block is removed."""
        path = self.folder / uuid.uuid4().hex
        lock = path.with_suffix(".lock")
        descriptor = _own(lock)
        try:
            yield path
        finally:
            _remove(path)
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def sweep(self) -> tuple[str, ...]:
        """Remove what dead writers left, and return the names. What we may not remove waits for its owner's sweep."""
        removed = []
        for lock in sorted(self.folder.glob("*.lock")):
            try:
                descriptor = os.open(lock, os.O_RDWR)
            except (FileNotFoundError, PermissionError):
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(lock.with_suffix(""))
                lock.unlink(missing_ok=True)
                removed.append(lock.stem)
            except (BlockingIOError, PermissionError):
                continue  # its writer lives, or the folder keeps users from removing each other's files
            finally:
                os.close(descriptor)
        return tuple(removed)


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """Give the path of a folder for one process alone, not made yet; it is removed at the end of the block or, after a
    kill, by the next call.

    Args:
        parent: A folder of the cache directory.

    Raises:
        StorageError: when nothing can be written there.
    """
    copies = Temporaries(parent)
    with ExitStack() as stack:
        with disk_errors(f"the cache directory {parent}", hint="set BITMILL_CACHE to a folder that can be written to"):
            make_folders(parent)
            copies.sweep()
            folder = stack.enter_context(copies.claim())
        yield folder


def _open_lock(path: Path) -> int:
    """Return a descriptor of a lock file, which may be another user's: a local flock needs no right to write."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY)


def _own(lock: Path) -> int:
    """Return a descriptor that holds the flock on a lock file that exists."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # a sweep took it for a leftover between the two calls


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
