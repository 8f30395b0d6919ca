"""Objects as plain files under a directory.

A write goes to a private temporary, is flushed, and takes its place by one link or rename, so readers and a killed
writer see the old object or the new one. Commits hold one lock per store: ``if_match`` has to compare and replace as
one step, and plain writes and deletes must not fall between the two. ``if_absent`` is a hard link besides, which
even file systems with unreliable locks do atomically. An etag is the SHA-256 of the content: inode and mtime would
be cheaper, but both come back within one tick of the clock when small files are replaced quickly.

Everything that is not an object lives in ``.bitmill-tmp/``, which is never listed.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from pipeline.disk import disk_errors, make_folders, save_file, sync, write_file
from pipeline.errors import ConditionalWriteError, ConflictError, StorageError, TargetUnavailableError
from pipeline.fingerprint import digest_bytes, digest_file
from pipeline.storage.objects import (
    CHUNK_BYTES,
    Blob,
    ObjectInfo,
    changed_file,
    check_key,
    missing_object,
    reading_errors,
    short_object,
)
from pipeline.storage.temporaries import Temporaries, exclusive_lock

PRIVATE_FOLDER = ".bitmill-tmp"
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class DirectoryStore:
    """An `ObjectStore` on a local or shared file system.

    The directory is created by the first write, its parent must exist. The first write also removes what killed
    writers left behind.

    Attributes:
        root: Absolute path of the directory.
    """

    def __init__(self, root: Path) -> None:
        self._given = root.expanduser()
        self.root = self._given.absolute()
        self._temporaries = Temporaries(self.root / PRIVATE_FOLDER)
        self._is_ready = False

    @property
    def url(self) -> str:
        """The directory's path as it was given, so that what is printed can be typed again where it was typed."""
        return str(self._given)

    def path_of(self, key: str) -> Path:
        """Return where the object's file is or would be."""
        if check_key(key).split("/")[0] == PRIVATE_FOLDER:
            raise StorageError(f"{key!r} cannot be the key of an object", code="storage.key")
        return self.root / key

    def head(self, key: str) -> ObjectInfo | None:
        """Return the object's facts, or None when there is no such object."""
        path = self.path_of(key)
        with self._errors():
            try:
                return _info(key, path) if path.is_file() else None
            except FileNotFoundError:
                return None

    def read(self, key: str) -> Blob | None:
        """Return the whole content, or None when there is no such object."""
        path = self.path_of(key)
        with self._errors():
            try:
                data = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        return Blob(data, digest_bytes(data))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive).

        Raises:
            StorageError: when the object is missing or shorter than ``end``.
        """
        path = self._existing(key)
        with self._errors(), path.open("rb") as handle:
            handle.seek(start)
            data = handle.read(end - start)
        if len(data) != end - start:
            raise short_object(self.url, key, end)
        return data

    def stream(self, key: str) -> Iterator[bytes]:
        """Return the content in chunks of 1 MiB.

        Raises:
            StorageError: when the object is missing.
        """
        path = self._existing(key)
        with self._errors(), path.open("rb") as handle:
            while chunk := handle.read(CHUNK_BYTES):
                yield chunk

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a file, which appears whole or not at all.

        Raises:
            StorageError: when the object is missing.
            DiskFullError: when the file's disk is full.
        """
        with disk_errors(str(path.parent), hint="free some space there, or choose another folder"):
            save_file(path, self.stream(key))

    def holds(self, key: str, size_bytes: int, sha256: str) -> bool:
        """Return whether the object is there with this size and SHA-256; reads it when the size is right."""
        info = self.head(key)
        if info is None or info.size_bytes != size_bytes:
            return False
        with self._errors():
            return digest_file(self.path_of(key)) == sha256

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Copy a file to ``key``, replacing what is there.

        Raises:
            StorageError: when the file cannot be read, or its bytes do not have the SHA-256; nothing appears then.
        """
        target = self.path_of(key)
        hasher = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            with reading_errors(path), path.open("rb") as handle:
                while chunk := handle.read(CHUNK_BYTES):
                    hasher.update(chunk)
                    yield chunk

        self._prepare()
        with self._errors(), self._temporaries.claim() as temporary:
            write_file(temporary, chunks())
            if hasher.hexdigest() != sha256:
                raise changed_file(path, sha256, hasher.hexdigest())
            with self._lock():
                make_folders(target.parent)
                temporary.replace(target)
                sync(target.parent)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write an object and return its etag.

        Raises:
            ConflictError: when the condition does not hold; nothing was written.
            ConditionalWriteError: when the file system has no hard links.
        """
        target = self.path_of(key)
        self._prepare()
        with self._errors(), self._temporaries.claim() as temporary:
            write_file(temporary, (data,))
            with self._lock():
                make_folders(target.parent)
                if if_absent:
                    self._link(temporary, target, key)
                else:
                    if if_match is not None and not (target.is_file() and digest_file(target) == if_match):
                        raise ConflictError(f"{self.url}/{key} was changed by somebody else")
                    temporary.replace(target)
                sync(target.parent)
        return digest_bytes(data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Return the objects whose keys start with ``prefix``, in the order of their keys."""
        base = prefix.rpartition("/")[0]
        top = self.root / check_key(base) if base else self.root
        found = []
        with self._errors():
            for folder, subfolders, names in os.walk(top, onerror=_refuse):
                if Path(folder) == self.root and PRIVATE_FOLDER in subfolders:
                    subfolders.remove(PRIVATE_FOLDER)
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self.root).as_posix()
                    try:
                        if key.startswith(prefix):
                            found.append(_info(key, path))
                    except FileNotFoundError:
                        continue  # deleted since the folder was read
        yield from sorted(found, key=lambda info: info.key.encode())

    def delete(self, key: str) -> None:
        """Remove an object and the folders that it leaves empty."""
        path = self.path_of(key)
        with self._errors():
            if not path.exists():
                return
        self._prepare()
        with self._errors(), self._lock():
            path.unlink(missing_ok=True)
            folder = path.parent
            while folder != self.root and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent
            sync(folder)

    def sweep_partial(self, prefix: str, before: datetime) -> tuple[str, ...]:
        """Remove the temporaries of dead writers and return their names; their locks tell them, so neither ``prefix``
        nor ``before`` matters here."""
        check_key(prefix.removesuffix("/"))
        with self._errors():
            return self._temporaries.sweep()

    def _existing(self, key: str) -> Path:
        path = self.path_of(key)
        with self._errors():
            if not path.is_file():
                raise missing_object(self.url, key)
        return path

    def _link(self, temporary: Path, target: Path, key: str) -> None:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise ConflictError(f"{self.url}/{key} is there already") from None
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise ConditionalWriteError(
                f"the file system of {self.url} has no hard links, so two writers could overwrite each other",
                hint="choose a directory on another file system, or an s3:// target",
            ) from error

    def _prepare(self) -> None:
        """Create the directory where needed and clean up after killed writers, once per store object."""
        if self._is_ready:
            return
        with self._errors():
            if not self.root.parent.is_dir():
                raise TargetUnavailableError(
                    f"cannot create {self.url}: its parent folder does not exist", hint=f"mkdir -p {self.root.parent}"
                )
            if self.root.exists() and not self.root.is_dir():
                raise TargetUnavailableError(f"{self.url} is not a directory", hint="choose another target")
            make_folders(self._temporaries.folder)
            self._temporaries.sweep()
        self._is_ready = True

    def _lock(self) -> AbstractContextManager[None]:
        return exclusive_lock(self._temporaries.folder / "commit")

    def _errors(self) -> AbstractContextManager[None]:
        return disk_errors(
            self.url, hint="free some space or change its permissions, or choose another target; then run it again"
        )


def _info(key: str, path: Path) -> ObjectInfo:
    facts = path.stat()
    return ObjectInfo(key, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))


def _refuse(error: OSError) -> None:
    """os.walk skips folders it cannot read; a listing with holes would be a wrong answer."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
