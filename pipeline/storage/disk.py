"""Durable writes on a file system: locks, private temporaries, and its errors in our words.

A temporary belongs to a living writer as long as the writer holds the flock on its ``.lock`` file. The kernel lets go
of the lock when the process ends, however it ends, so a sweep can tell leftovers from work in progress without
trusting process ids (which are reused, and mean nothing on another machine) or ages.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import DiskFullError, StorageError, TargetUnavailableError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


@contextmanager
def disk_errors(place: str, *, hint: str, only_full: bool = False) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names ``place`` and the file.

    Args:
        place: The directory that is written to, as the user knows it.
        hint: What to do when it is full or cannot be written.
        only_full: Let all errors but those of a full disk pass as they are.

    Raises:
        DiskFullError: for no space or no quota.
        TargetUnavailableError: for no permission, a read-only file system, or a folder that vanished.
        StorageError: for every other failure of the file system.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        what = f"{place}: {reason}" + (f" ({error.filename})" if error.filename else "")
        if error.errno in _FULL:
            raise DiskFullError(f"no space left in {what}", hint=hint) from error
        if only_full:
            raise
        if error.errno in _DENIED:
            raise TargetUnavailableError(f"no access to {what}", hint=hint) from error
        if error.errno in _GONE:
            raise TargetUnavailableError(f"a folder is missing in {what}", hint=hint) from error
        raise StorageError(f"the file system failed in {what}", hint=hint) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Create a folder and its missing parents, durably."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Create a file with these bytes, flushed to the disk, readable as the umask says."""
    # Not tempfile: its mode 0600 would stay on the file and keep other users' engines from reading a release.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as handle:
        for chunk in chunks:
            handle.write(chunk)
        handle.flush()
        os.fsync(handle.fileno())


def save_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that appears at ``path`` whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        write_file(partial, chunks)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


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
