"""Durable writes on a file system, and its errors in our words. For every package that writes files."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DiskFullError, StorageError, TargetUnavailableError
from pipeline.units import format_bytes

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


def write_error(error: OSError, path: Path, needed_bytes: int, *, elsewhere: str, check: str) -> StorageError:
    """Return what a failed write to one file means.

    Args:
        error: Why it failed.
        path: The file.
        needed_bytes: How many more bytes it needs.
        elsewhere: What to do when its disk stays full, after "or".
        check: What to do about every other failure.
    """
    if error.errno in _FULL:
        needed = format_bytes(needed_bytes)
        return DiskFullError(
            f"{path}: no space left; {needed} more are needed",
            hint=f"free at least {needed} there, or {elsewhere}",
            context={"path": str(path), "needed_bytes": needed_bytes},
        )
    return StorageError(f"{path} cannot be written: {error.strerror or error}", hint=check)


def sync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
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
        sync(new.parent)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Create a file with these bytes, flushed to the disk, readable as the umask says."""
    # Not tempfile: its mode 0600 would stay on the file and keep other users' engines from reading a release.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as handle:
        for chunk in chunks:
            handle.write(chunk)
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden path beside ``path``; what the block writes there takes its place, synced, when it succeeds.

    A crash leaves the old file or none, and perhaps the hidden one (``.<name>.*.tmp``). Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that appears at ``path`` whole or not at all. Raises OSError."""
    with replacing(path) as temporary, temporary.open("xb") as handle:
        handle.writelines(chunks)
