"""What an object store promises, and how one is opened.

A store maps keys (``releases/org/name/…``) to bytes. An object appears whole or not at all, whatever kills its writer.
Two conditions make concurrent writers safe: ``if_absent`` (only one of many creators wins) and ``if_match`` (a write
succeeds only on top of the content that was read). `DirectoryStore` and `S3Store` pass one contract suite; a store that
ignores the conditions is found out by `pipeline.storage.probe.probe`.

Absent, unreadable and failed are three answers: `ObjectStore.read` and `ObjectStore.head` return None for an object
that is not there, and raise a `StorageError` for everything that keeps us from knowing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from pipeline.errors import SpecError, StorageError
from pipeline.settings import Settings

CHUNK_BYTES = 1 << 20
MISSING_OBJECT = "storage.missing_object"
"""Code of the error for an object that had to be there."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class ObjectInfo:
    """An object, without its content.

    Attributes:
        key: Its key, relative to the store.
        size_bytes: Length of its content.
        modified_at: When it was written, by the store's clock (UTC).
        etag: Stands for exactly its content where a listing said so; else empty.
    """

    key: str
    size_bytes: int
    modified_at: datetime
    etag: str = ""


@dataclass(frozen=True)
class Blob:
    """The content of an object, and the proof of having read it.

    Attributes:
        data: The bytes.
        etag: Stands for exactly this content; give it to ``put(if_match=…)`` to write on top of it.
    """

    data: bytes
    etag: str


class ObjectStore(Protocol):
    """A place for objects. All methods may raise `StorageError` and its subclasses."""

    @property
    def url(self) -> str:
        """Where the store is: a directory's path or ``s3://bucket/prefix``; ``url + "/" + key`` names an object."""

    def head(self, key: str) -> ObjectInfo | None:
        """Return the object's facts, or None when there is no such object."""

    def read(self, key: str) -> Blob | None:
        """Return the whole content (meant for small objects), or None when there is no such object."""

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive) of an object that has them all.

        Raises:
            StorageError: when the object is missing or shorter than ``end``.
        """

    def stream(self, key: str) -> Iterator[bytes]:
        """Return the content in chunks of about 1 MiB.

        Raises:
            StorageError: when the object is missing, or is replaced while it is read.
        """

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a file, which appears whole or not at all.

        Raises:
            StorageError: when the object is missing.
        """

    def holds(self, key: str, size_bytes: int, sha256: str) -> bool:
        """Return whether the object is there with this size and SHA-256, without transferring it."""

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Write a file of any size to ``key``, replacing what is there.

        Raises:
            StorageError: when the file cannot be read, or its bytes do not have the SHA-256; nothing appears then.
        """

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object and return its etag.

        Args:
            key: Where.
            data: What.
            if_absent: Write only when there is no such object.
            if_match: Write only when the object's content is the one with this etag.

        Raises:
            ConflictError: when the condition does not hold; nothing was written.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Return the objects whose keys start with ``prefix``, in the order of their keys."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there stays so."""

    def sweep_partial(self, prefix: str, before: datetime) -> tuple[str, ...]:
        """Remove what interrupted writers left outside the visible objects, and return its names.

        Args:
            prefix: Folder of the keys that they wrote to. Not the whole store: a bucket may hold other people's
                uploads. A store that knows its dead writers removes what they left, wherever they wrote to.
            before: Uploads that began later are kept where a store cannot tell whether their writer still lives.

        Raises:
            StorageError: also for an empty prefix.
        """


def open_store(url: str, settings: Settings, *, attempts: int | None = None) -> ObjectStore:
    """Return the store at a directory's path or ``s3://bucket/prefix``. Nothing is read or written yet.

    Args:
        url: Where the store is.
        settings: Endpoint for ``s3://``.
        attempts: Attempts of each request to a service, with growing waits between them; None for the usual ones.

    Raises:
        SpecError: when ``url`` is neither.
        TargetUnavailableError: when the S3 endpoint or its settings cannot be used.
    """
    if url.startswith("s3://"):
        # Loads boto3, which takes half a second that directory targets and --help need not pay.
        from pipeline.storage.s3 import connect_s3

        bucket, prefix = split_s3(url)
        return connect_s3(bucket, prefix, settings.s3_endpoint, attempts)
    if not url or _SCHEME.match(url):
        raise SpecError(
            f"{url!r} is not a target that Bitmill can write to",
            code="spec.target",
            hint="give the path of a directory, or s3://bucket/prefix",
        )
    # Here and not above: that module needs this one's types.
    from pipeline.storage.directory import DirectoryStore

    return DirectoryStore(Path(url))


def split_s3(url: str) -> tuple[str, str]:
    """Return the bucket and the prefix that ``s3://bucket/prefix`` names; the prefix without slashes around it.

    Raises:
        SpecError: when it names no bucket.
        StorageError: when there can be no such prefix.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise SpecError(
            f"{url!r} names no bucket", code="spec.target", hint="write it as s3://bucket or s3://bucket/prefix"
        )
    prefix = prefix.strip("/")
    return bucket, check_key(prefix) if prefix else ""


def check_key(key: str) -> str:
    """Return ``key`` when it is a plain relative path that means the same on every store.

    Raises:
        StorageError: for absolute paths, empty or dotted parts, backslashes and control characters.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in key or not key.isprintable():
        raise StorageError(f"{key!r} cannot be the key of an object", code="storage.key")
    return key


def missing_object(url: str, key: str) -> StorageError:
    """Return the error for an object that had to be there."""
    return StorageError(f"{url}/{key} does not exist", code=MISSING_OBJECT)


def short_object(url: str, key: str, end: int) -> StorageError:
    """Return the error for an object that ends before byte ``end``."""
    return StorageError(f"{url}/{key} has fewer than {end} bytes", code="storage.short_object")


def changed_file(path: Path, sha256: str, found: str) -> StorageError:
    """Return the error for a file whose bytes are not those that were hashed before."""
    return StorageError(
        f"{path} changed while it was being uploaded: SHA-256 {found}, expected {sha256}",
        code="storage.changed_file",
        hint="run the same command again when nothing else writes to that folder",
    )


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of reading ``path``, or what is in it, for a release into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot read {error.filename or path} to publish it: {error.strerror or error}",
            code="storage.unreadable_file",
            hint="check its permissions, and run the same command again when nothing else writes to that folder",
        ) from error
