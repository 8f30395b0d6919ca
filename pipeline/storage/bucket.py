"""A model in a bucket, to be converted: its listing, and ranges of exactly the objects that were listed.

Endpoint, credentials and region are those of targets. Errors are a source's: a command that reads one bucket and writes
another says which of them it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

from botocore.exceptions import ClientError, FlexibleChecksumError, NoCredentialsError, PartialCredentialsError

from pipeline.errors import (
    ConflictError,
    CorruptWeightsError,
    SourceError,
    SourceNotFoundError,
    SpecError,
    StorageError,
)
from pipeline.storage.objects import MISSING_OBJECT, split_s3
from pipeline.storage.s3 import S3Store, connect_s3
from pipeline.storage.s3_errors import error_code, error_status

READ_ATTEMPTS = 8
"""Attempts of a read: a run outlives a minute in which the service fails. The listing, which comes first, has the usual
ones: who cannot be reached at all is more often a typo than an outage."""


class ListedFile(Protocol):
    """An object as it was listed."""

    @property
    def path(self) -> str:
        """Its key below the prefix."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def etag(self) -> str | None:
        """What the bucket called its content."""


@dataclass(frozen=True)
class SourceBucket:
    """The objects below ``s3://bucket/prefix``. Pickles without its connection.

    Attributes:
        bucket: Name of the bucket.
        prefix: Of all keys, without a slash at its end; empty for the whole bucket.
        endpoint: Base URL of the service; None for AWS.
    """

    bucket: str
    prefix: str
    endpoint: str | None

    @classmethod
    def at(cls, url: str, endpoint: str | None) -> Self:
        """Return the source at ``s3://bucket/prefix``. Sends nothing.

        Raises:
            SourceNotFoundError: when there can be no such place.
        """
        try:
            bucket, prefix = split_s3(url)
        except (SpecError, StorageError) as error:
            raise SourceNotFoundError(
                f"source {url!r:.200} names no place in a bucket",
                code="source.bad_name",
                hint="write it as s3://bucket/prefix, where prefix is the folder that holds config.json",
            ) from error
        return cls(bucket, prefix, endpoint)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.bucket, self.prefix, self.endpoint)

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def listing(self) -> Iterator[tuple[str, int, str]]:
        """Yield key below the prefix, size in bytes and ETag of each object, page by page, in the server's order.

        Raises:
            SourceNotFoundError: when the bucket or the service is not there or not accessible.
        """
        with self._errors(self.url):
            store = connect_s3(self.bucket, self.prefix, self.endpoint)
            for info in store.entries(""):
                yield info.key, info.size_bytes, info.etag

    def copy_range(self, file: ListedFile, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Give the bytes ``[start, end)`` of an object to ``sink`` in order, over broken connections, as long as its
        content is the one that was listed.

        Raises:
            SourceNotFoundError: when the bucket or the service is not there or not accessible.
            CorruptWeightsError: when the object is gone or has another content now, or came with a wrong checksum.
        """
        if start < end:
            for chunk in self._chunks(file, start, end):
                sink(chunk)

    @cached_property
    def _store(self) -> S3Store:
        return connect_s3(self.bucket, self.prefix, self.endpoint, READ_ATTEMPTS)

    def _chunks(self, file: ListedFile, start: int, end: int) -> Iterator[bytes]:
        # A generator, so that what `sink` raises does not pass through here.
        is_whole = (start, end) == (0, file.size_bytes)
        with self._errors(f"{self.url}/{file.path}"):
            yield from self._store.stream_range(file.path, start, end, file.etag or "", is_whole=is_whole)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            raise _as_source_error(error, what, self.endpoint or "AWS") from error


def _as_source_error(error: StorageError, what: str, endpoint: str) -> SourceError:
    """Return what a failed read of ``what`` means for a conversion."""
    cause = error.__cause__
    if isinstance(error, ConflictError) or error.code == MISSING_OBJECT:
        became = "was replaced" if isinstance(error, ConflictError) else "was removed"
        return CorruptWeightsError(
            f"{what} {became} after the source was listed",
            code="source.changed",
            hint="run the command again when nothing writes there: it begins with what is there then",
            context={"file": what},
        )
    if isinstance(cause, FlexibleChecksumError):
        damaged = f"{what} came with another checksum than {endpoint} has of it"
        return CorruptWeightsError(damaged, code="source.digest", hint="run the command again")
    if isinstance(cause, ClientError) and error_code(cause) == "NoSuchBucket":
        missing = f"there is no bucket for {what} at {endpoint}"
        return SourceNotFoundError(
            missing, hint="check its name, and AWS_ENDPOINT_URL_S3, which says where buckets are"
        )
    is_refused = isinstance(cause, ClientError) and error_status(cause) in (401, 403)
    if is_refused or isinstance(cause, (NoCredentialsError, PartialCredentialsError)):
        return SourceNotFoundError(
            f"{endpoint} refuses access to {what}: {error.message}", code="source.unauthorized", hint=error.hint
        )
    return SourceNotFoundError(
        f"{what} cannot be read from {endpoint}: {error.message}", code="source.unreachable", hint=error.hint
    )
